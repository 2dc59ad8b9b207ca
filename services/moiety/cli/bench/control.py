"""`moiety bench control`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from moiety.cli.options import invocation, json_option, rounds_option, write_json
from moiety.cli.run import progress


@click.command()
@click.option("--replicas", type=click.IntRange(1, 100_000), default=2000, help="Expert replicas.")
@click.option("--routers", type=click.IntRange(1, 1000), default=16, help="Routers that read the registry.")
@click.option("--layers", type=click.IntRange(1, 1000), default=58, help="MoE layers.")
@click.option("--experts", type=click.IntRange(1, 4096), default=256, help="Experts per layer.")
@click.option("--groups", type=click.IntRange(1, 4096), default=64, help="Expert groups.")
@click.option("--hot-sets", type=click.IntRange(0, 1024), default=16, help="Hot sets.")
@rounds_option
@json_option
@click.pass_context
def control(context: click.Context, /, json_file: Path | None, **options: int) -> None:
    """Measure the control plane of a large system: planning, the dispatch table, the traffic on Redis.

    Nothing is served: the replicas exist only as entries in a real Redis, which this benchmark starts. Each kind of
    request to Redis is measured alone. The total counts each kind as often as a running system sends it. The dispatch
    table says which replicas hold each expert.

    \b
    Example:
      moiety bench control --replicas 2000
    """
    from moiety.bench.control import ControlWork, bench_control, control_lines
    from moiety.tools.machine import Machine

    machine = Machine.here()
    work = ControlWork(**options)
    report = bench_control(work, progress())
    for line in (*control_lines(report, work), *machine.lines(), f"rerun:   {invocation(context)}"):
        click.echo(line)
    write_json(json_file, {"machine": asdict(machine), "work": asdict(work), "report": asdict(report)})
