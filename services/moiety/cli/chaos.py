"""`moiety chaos`."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from moiety.cli.arguments import FiniteRange
from moiety.cli.options import ModelName, WordList, invocation, json_option, local_model, write_json
from moiety.cli.run import progress, run_async, signals_interrupt


@click.command()
@click.option("--seed", type=click.IntRange(0), default=0, help="Chooses which faults come when, and to whom.")
@click.option("--faults", type=click.IntRange(1), help="Faults, skipped or not.  [default: one of every family]")
@click.option("--minutes", type=FiniteRange(0.1), help="Minutes to run, instead of a number of faults.")
@click.option("--only", type=WordList(), default=(), help="Only these kinds or families of --list, with commas.")
@click.option("--list", "listed", is_flag=True, help="List the kinds: what is done, and what must hold. Then stop.")
@click.option("--on", "place", type=click.Choice(("local", "ray")), default="local", help="Child processes, or Ray.")
@click.option("--model", type=ModelName(), help="Folder or Hugging Face id.  [default: writes a tiny one]")
@click.option("--slack", type=FiniteRange(1), default=1.0, help="Multiply the bounds of gaps, on a busy machine.")
@json_option
@click.pass_context
def chaos(context: click.Context, /, json_file: Path | None, listed: bool, place: str, **options: Any) -> None:
    """Let faults of every kind happen to a system under load, and check that nothing is lost.

    Starts a system of its own: two holders of each expert, two routers, a gateway and a Redis. Twelve streams run
    without a pause. One fault after another begins, lasts some seconds and ends: processes are killed and stopped,
    devices fail, replicas lie, connections break, Redis refuses, the disk is full. Every stream's tokens are compared
    with those of a quiet run. At the end of each fault the system is made whole, and what it left behind is measured.

    Exit status 1 if a request failed, a token changed, a stream waited longer than the bound of its fault, or something
    was left behind. Kinds that this machine cannot have are skipped by name. Everything it started ends with it.

    \b
    Examples:
      moiety chaos
      moiety chaos --only redis,expert-kill --faults 6 --seed 7
      moiety chaos --minutes 20 --json chaos.json
      moiety chaos --on ray --faults 4
    """
    from moiety.bench.report import table
    from moiety.tools.chaos.chaos import ChaosRun, chaos_folder, on_ray, run_local
    from moiety.tools.chaos.kinds import chosen
    from moiety.tools.chaos.report import HEADER, rows_of

    if listed:
        for kind in chosen(options["only"], ray=place == "ray"):
            where = "" if kind.on_ray else " (not on Ray)"
            click.echo(f"{kind.name:20} {kind.does}{where}: {kind.holds}; at most {kind.bound_s:g} s")
        return
    kinds = chosen(options["only"], ray=place == "ray")
    if options["faults"] is None and options["minutes"] is None:
        options["faults"] = context.params["faults"] = len({kind.family for kind in kinds})
    if options["model"] is not None:
        options["model"] = local_model(options["model"])
    run = ChaosRun(**options)
    say = progress()
    with chaos_folder(run) as (disk, model):
        if place == "ray":
            with signals_interrupt(), on_ray(run, disk, model, say) as trials:
                outcome = asyncio.run(trials)
        else:
            outcome = run_async(run_local(run, disk, model, say))
    rows = rows_of(outcome, run.slack)
    for line in table(HEADER, [row.cells for row in rows]):
        click.echo(line)
    for row in rows:
        for text in row.broken:
            click.echo(f"{row.fault}: DID NOT HOLD: {text}")
    if outcome.leaks is not None:
        click.echo(f"all faults together left behind: {outcome.leaks}")
        for text in outcome.leaks.excess:
            click.echo(f"all: DID NOT HOLD: {text}")
    for name, reason in outcome.skipped.items():
        click.echo(f"{name}: skipped: {reason}")
    click.echo(
        f"{len(outcome.trials)} faults, {len(outcome.skipped)} kinds skipped; "
        f"quiet: {outcome.quiet.tokens_per_s:.0f} tokens/s, worst gap {outcome.quiet.worst_gap_s:.2f} s"
    )
    click.echo(f"seed {run.seed}; rerun: {invocation(context)}")
    write_json(json_file, {"seed": run.seed, "passed": outcome.passed, "rows": [asdict(row) for row in rows]})
    context.exit(0 if outcome.passed else 1)
