"""`moiety doctor`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from moiety.cli.options import json_option, write_json


@click.command()
@click.option("--measure", is_flag=True, help="Measure memory and matrix products too: some seconds, all cores.")
@json_option
@click.pass_context
def doctor(context: click.Context, measure: bool, json_file: Path | None) -> None:
    """Say what decides how well this machine serves, and what is wrong.

    Every line has a verdict: ok; warn, where something is slower or less than it could be; fail, where serving cannot
    work. What to do stands below it. Exit status 1 where something fails.

    \b
    Example:
      moiety doctor --measure
    """
    from moiety.tools.doctor import Verdict, doctor_lines, examine

    checks = list(examine(measure=measure))
    for line in doctor_lines(checks):
        click.echo(line)
    write_json(json_file, [asdict(check) for check in checks])
    context.exit(1 if any(check.verdict is Verdict.FAIL for check in checks) else 0)
