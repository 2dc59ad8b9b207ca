"""`moiety rebalance`."""

from __future__ import annotations

import click

from moiety.cli.run import progress, run_async


@click.command()
@click.option("--registry", default="redis://127.0.0.1:6379/0", show_default=True, envvar="MOIETY_REGISTRY")
@click.option("--app", default="moiety", show_default=True, envvar="MOIETY_APP", help="Prefix of its registry keys.")
@click.option(
    "--watch",
    "watch_s",
    type=click.FloatRange(2, 3600),
    default=6.0,
    show_default=True,
    help="Seconds of load to plan for, from now on.",
)
@click.option("--hot-sets", type=click.IntRange(0, 256), help="Hot sets that may be filled.  [default: as deployed]")
@click.option("--hot-memory", default="1GiB", show_default=True, help="For the experts of a hot set.")
@click.option(
    "--layers-at-once", type=click.IntRange(1), help="Fewer need less memory to spare, and longer.  [default: all]"
)
@click.option("--dry-run", is_flag=True, help="Show the plan, change nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(1, 3600),
    default=120.0,
    show_default=True,
    help="Seconds to follow.",
)
def rebalance(
    registry: str,
    app: str,
    watch_s: float,
    hot_sets: int | None,
    hot_memory: str,
    layers_at_once: int | None,
    dry_run: bool,
    yes: bool,
    timeout_s: float,
) -> None:
    """Place experts anew by the load of the moment, without a stop.

    Shows what would move where, and what it is worth. Then replicas load what is new beside what they hold, routers take
    it into use, and what is no longer needed is dropped: requests that run meanwhile keep their tokens.

    \b
    Example:
      moiety rebalance --dry-run
    """
    from pydantic import ByteSize, TypeAdapter, ValidationError

    from moiety.registry.connect import connect
    from moiety.tools.rebalance import Ask, enact, proposed

    try:
        memory = int(TypeAdapter(ByteSize).validate_python(hot_memory))
    except ValidationError:
        raise click.BadParameter(f"{hot_memory!r}: must be a size, such as 4GiB", param_hint="--hot-memory") from None

    async def work() -> None:
        store = connect(registry, app)
        try:
            found = await proposed(store, Ask(watch_s, hot_sets, memory))
            for line in found.lines():
                click.echo(line)
            if not found.changes:
                click.echo("nothing to change")
            elif not dry_run and (yes or click.confirm(f"Put placement {found.placement.epoch} in force?")):
                await enact(store, found, timeout_s, progress(), layers_at_once or 0)
        finally:
            await store.close()

    run_async(work())
