"""`moiety doctor`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from moiety.cli.options import json_option, write_json


@click.command()
@click.option(
    "--measure",
    is_flag=True,
    help="Also measure memory bandwidth and matrix products; takes a few seconds and all cores.",
)
@json_option
@click.pass_context
def doctor(context: click.Context, measure: bool, json_file: Path | None) -> None:
    """Check what decides how well this machine serves, and report what is wrong.

    Every check has a verdict: ok, warn (slower or less capable than it could be) or fail (serving cannot work). The line
    below a warning or failure says what to do. Exit status 1 if a check fails.

    \b
    Example:
      moiety doctor --measure
    """
    from moiety.tools.doctor import Finding, doctor_lines, examine

    checks = list(examine(measure=measure))
    for line in doctor_lines(checks):
        click.echo(line)
    write_json(json_file, [asdict(check) for check in checks])
    context.exit(1 if any(check.verdict is Finding.FAIL for check in checks) else 0)
