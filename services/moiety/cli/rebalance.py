"""`moiety rebalance`."""

from __future__ import annotations

from typing import Any

import click

from moiety.cli.arguments import FiniteRange
from moiety.cli.json_output import json_output_option, print_json
from moiety.cli.run import progress, run_async
from moiety.cli.setting_options import setting_option, settings_of_system


@click.command()
@setting_option("--registry", "registry", default="that of the system on this machine")
@setting_option("--app", "app", default="the only system on this machine, or moiety; a pid works too")
@setting_option("--hot-memory", "hot_memory")
@click.option(
    "--watch", "watch_s", type=FiniteRange(2, 3600), default=6.0, help="Seconds to watch the load before planning."
)
@click.option(
    "--hot-sets", type=click.IntRange(0, 256), help="Hot sets that the plan may fill.  [default: as deployed]"
)
@click.option("--system", "wanted", default="", help="A part of the system's name, if several of this app are live.")
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
    type=FiniteRange(1, 3600),
    default=120.0,
    help="Seconds that replicas may take to follow each stage of the change.",
)
@json_output_option
def rebalance(
    watch_s: float,
    hot_sets: int | None,
    wanted: str,
    layers_at_once: int | None,
    dry_run: bool,
    yes: bool,
    timeout_s: float,
    as_json: bool,
    **given: Any,
) -> None:
    """Move experts between replicas to fit the current load, while requests run.

    Prints which experts would move where and what that gains. Then replicas load their new experts beside those they
    hold, routers switch to the new placement, and replicas drop the experts they no longer need. Requests that run
    meanwhile keep their tokens.

    Without --registry, it is the system that `moiety serve` runs on this machine. With --json, the plan is written once it
    is in force, or at once with --dry-run.

    \b
    Examples:
      moiety rebalance --dry-run
      moiety rebalance --registry redis://redis.example:6379/0 --yes --json plan.json
    """
    from moiety.registry.connect import connect
    from moiety.tools.rebalance import RebalanceRequest, apply_placement, plan_json, propose_placement
    from moiety.tools.running.find import find_system

    settings = settings_of_system(**given)

    async def work() -> None:
        found = await find_system(settings, wanted)
        store = connect(found.url, found.known())
        try:
            plan = await propose_placement(store, RebalanceRequest(watch_s, hot_sets, int(settings.hot_memory)))
            if not as_json:
                for line in plan.lines():
                    click.echo(line)
            question = f"Put placement {plan.placement.epoch} in force?"
            apply = plan.changes and not dry_run and (yes or click.confirm(question, err=as_json))
            if apply:
                await apply_placement(store, plan, timeout_s, progress(), layers_at_once or 0)
            if as_json:
                print_json(plan_json(plan, str(found.known()), applied=apply))
        finally:
            await store.close()

    run_async(work())
