"""`moiety parity`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from moiety.cli.options import ModelName, check_first, dtype_option, groups_option, json_option, local_model, write_json
from moiety.cli.run import progress, run_async

SHORTEST_PROMPT = 3  # tokens; longer prompts are cut to the context


@click.command()
@click.argument("checkpoint", type=ModelName(), required=False)
@groups_option
@dtype_option("float32")
@click.option("--new-tokens", type=click.IntRange(1, 4096), default=24, help="Greedy tokens to generate per prompt.")
@click.option(
    "--all-tiny", is_flag=True, help="Instead of CHECKPOINT: compare a tiny checkpoint of every supported architecture."
)
@click.option(
    "--only",
    multiple=True,
    metavar="NAME",
    help="With --all-tiny: compare only this architecture. Repeatable; or names with commas.",
)
@click.option(
    "--write",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="With --all-tiny: write the table into this file, between its two `parity` marker lines; with --only, write "
    "only those rows.",
)
@click.option(
    "--references",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Python file with plain forward passes of architectures that transformers lacks.  "
    "[default: tests/parity/references.py]",
)
@json_option
@click.pass_context
def parity(
    context: click.Context,
    checkpoint: str | None,
    groups: int,
    dtype: str,
    new_tokens: int,
    all_tiny: bool,
    only: tuple[str, ...],
    write: Path | None,
    references: Path | None,
    json_file: Path | None,
) -> None:
    """Compare the served system with transformers, token for token.

    CHECKPOINT is a folder with config.json and safetensors, or a Hugging Face id. Eight prompts run through plain
    transformers, one at a time, then all at once through gateway, router and expert groups on this machine. Exit status 0
    only if each prompt's tokens are identical, or first differ at a tie: a token at which rounding decides the
    reference's choice. --all-tiny accepts no ties.

    \b
    Examples:
      moiety parity ./Qwen3-30B-A3B --groups 4 --json parity.json
      moiety parity --all-tiny --only mixtral,dbrx
    """
    if all_tiny == (checkpoint is not None):
        raise click.UsageError("give either CHECKPOINT or --all-tiny")
    if not all_tiny and (only or write):
        raise click.UsageError("--only and --write need --all-tiny")
    if checkpoint is None:
        names = [name for part in only for name in part.split(",")]
        context.exit(0 if _all_tiny(names, groups, new_tokens, references, write, json_file) else 1)
    folder = local_model(checkpoint)
    check_first(folder, groups=groups, tokens=new_tokens + SHORTEST_PROMPT)
    from moiety.tools.parity.parity import run_parity

    report = run_async(
        run_parity(
            folder,
            groups=groups,
            new_tokens=new_tokens,
            dtype=dtype,
            references=references,
            progress=progress(),
        )
    )
    for line in report.lines():
        click.echo(line)
    write_json(json_file, {"ok": report.ok, "logit_error": report.logit_error, **asdict(report)})
    context.exit(0 if report.ok else 1)


def _all_tiny(
    names: list[str],
    groups: int,
    new_tokens: int,
    references: Path | None,
    write: Path | None,
    json_file: Path | None,
) -> bool:
    """Compares the tiny checkpoints and returns whether all are token for token identical to their references.

    Prints each architecture's row as it is ready. If given, `write` gets the table, `json_file` the results as JSON.
    """
    from moiety.synthetic import tiny_model, tiny_names
    from moiety.tools.parity.all_tiny import HEAD, ParityVerdict, run_all, summary, write_table

    try:
        for name in names:
            tiny_model(name)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--only") from error
    verdicts: list[ParityVerdict] = []

    async def show() -> None:
        architectures = names or tiny_names()
        async for verdict in run_all(
            architectures, groups=groups, new_tokens=new_tokens, references=references, progress=progress()
        ):
            verdicts.append(verdict)
            click.echo("{:<24} {:<20} {:<16} {}".format(*verdict.cells))

    click.echo("{:<24} {:<20} {:<16} {}".format(*HEAD))
    run_async(show())
    click.echo(summary(verdicts))
    write_json(json_file, [{"ok": verdict.ok, **asdict(verdict)} for verdict in verdicts])
    if write is not None:
        write_table(write, verdicts, keep=bool(names))
    return all(verdict.ok for verdict in verdicts)
