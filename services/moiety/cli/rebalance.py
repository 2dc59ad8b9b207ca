"""`moiety rebalance`."""

from __future__ import annotations

import click

from moiety.cli.options import ByteCount
from moiety.cli.run import progress, run_async


@click.command()
@click.option(
    "--registry",
    default="redis://127.0.0.1:6379/0",
    envvar="MOIETY_REGISTRY",
    help="URL of the Redis that holds the application's registry.",
)
@click.option(
    "--app", default="moiety", envvar="MOIETY_APP", help="Name of the application: the prefix of its registry keys."
)
@click.option(
    "--watch", "watch_s", type=click.FloatRange(2, 3600), default=6.0, help="Seconds to watch the load before planning."
)
@click.option(
    "--hot-sets", type=click.IntRange(0, 256), help="Hot sets that the plan may fill.  [default: as deployed]"
)
@click.option("--hot-memory", type=ByteCount(), default="1GiB", help="Bytes for the experts of one hot set.")
@click.option(
    "--layers-at-once",
    type=click.IntRange(1),
    help="MoE layers to change at a time; fewer need less spare memory and take longer.  [default: all]",
)
@click.option("--dry-run", is_flag=True, help="Show the plan and change nothing.")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(1, 3600),
    default=120.0,
    help="Seconds that replicas may take to follow each stage of the change.",
)
def rebalance(
    registry: str,
    app: str,
    watch_s: float,
    hot_sets: int | None,
    hot_memory: int,
    layers_at_once: int | None,
    dry_run: bool,
    yes: bool,
    timeout_s: float,
) -> None:
    """Move experts between replicas to fit the current load, while requests run.

    Prints which experts would move where and what that gains. Then replicas load their new experts beside those they
    hold, routers switch to the new placement, and replicas drop the experts they no longer need. Requests that run
    meanwhile keep their tokens.

    \b
    Example:
      moiety rebalance --dry-run
    """
    from moiety.registry.connect import connect
    from moiety.tools.rebalance import RebalanceRequest, apply_placement, propose_placement

    async def work() -> None:
        store = connect(registry, app)
        try:
            plan = await propose_placement(store, RebalanceRequest(watch_s, hot_sets, hot_memory))
            for line in plan.lines():
                click.echo(line)
            if not plan.changes:
                click.echo("nothing to change")
            elif not dry_run and (yes or click.confirm(f"Put placement {plan.placement.epoch} in force?")):
                await apply_placement(store, plan, timeout_s, progress(), layers_at_once or 0)
        finally:
            await store.close()

    run_async(work())
