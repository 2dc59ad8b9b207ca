"""`moiety parity`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from moiety.cli.options import dtype_option, groups_option, json_option, write_json
from moiety.cli.run import progress, run_async


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=str))
@groups_option
@dtype_option("float32")
@click.option(
    "--new-tokens", type=click.IntRange(1, 4096), default=24, show_default=True, help="Greedy tokens per prompt."
)
@json_option
@click.pass_context
def parity(
    context: click.Context, checkpoint: str, groups: int, dtype: str, new_tokens: int, json_file: Path | None
) -> None:
    """Compare the served system with transformers, token for token.

    CHECKPOINT is a folder with config.json and safetensors. Eight prompts run through plain transformers, one at a time,
    then all at once through gateway, router and expert groups on this machine. Exit status 0 only when every token
    agrees, or differs where the reference itself could not decide (a tie within the logit error).

    \b
    Example:
      moiety parity ./Qwen3-30B-A3B --groups 4 --json parity.json
    """
    from moiety.tools.parity import run_parity

    report = run_async(run_parity(checkpoint, groups=groups, dtype=dtype, new_tokens=new_tokens, progress=progress()))
    for line in report.lines():
        click.echo(line)
    write_json(json_file, {"ok": report.ok, "logit_error": report.logit_error, **asdict(report)})
    context.exit(0 if report.ok else 1)
