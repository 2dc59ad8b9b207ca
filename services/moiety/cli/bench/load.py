"""`moiety bench load`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from moiety.bench.load.arrivals import ARRIVALS
from moiety.bench.load.goodput import targets
from moiety.bench.load.work import PATHS, Length, LoadWork
from moiety.cli.arguments import FiniteRange
from moiety.cli.options import api_key_option, invocation, json_option, request_timeout_option, write_json
from moiety.cli.run import Interrupted, progress, run_async
from moiety.errors import InvalidRequest

Value = TypeVar("Value")


class _Parsed(click.ParamType[Value]):
    """Option type: a text that `parse` turns into a value."""

    def __init__(self, name: str, parse: Callable[[str], Value]):
        self.name, self._parse = name, parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Value:
        try:
            return self._parse(value) if isinstance(value, str) else value
        except InvalidRequest as error:
            self.fail(str(error), param, ctx)


def _json_object(text: str) -> str:
    """Returns `text` if it is a JSON object."""
    try:
        valid = isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        valid = False
    if not valid:
        raise InvalidRequest("extra", text, 'a JSON object, such as {"temperature": 0}')
    return text


@click.command()
@click.argument("url")
@click.option(
    "--rate",
    type=FiniteRange(min=0, min_open=True),
    help="Open loop: requests that arrive per second on average.",
)
@click.option(
    "--concurrency",
    type=click.IntRange(1, 65536),
    help="Closed loop instead: so many clients, each with one request at a time.",
)
@click.option(
    "--trace",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help='Open loop with the times and lengths of this file: lines {"timestamp": ms, "input_length", '
    '"output_length"}, as in Mooncake\'s public traces; equal "hash_ids" give equal text.',
)
@click.option(
    "--speed", type=FiniteRange(min=0, min_open=True), default=1.0, help="Speed of the trace; 2: twice the rate."
)
@click.option(
    "--arrivals",
    type=click.Choice(ARRIVALS),
    default="poisson",
    help="Intervals between arrivals: as of independent users, even, or in bursts.",
)
@click.option(
    "--burstiness",
    type=FiniteRange(min=0, min_open=True),
    default=1.0,
    help="Shape of --arrivals gamma: below 1 in bursts, 1 as poisson, above 1 more even.",
)
@click.option(
    "--requests",
    type=click.IntRange(min=1),
    help="Most requests.  [default: 100, or what arrives within --seconds or is in the trace]",
)
@click.option(
    "--seconds",
    type=FiniteRange(min=0, min_open=True),
    help="Requests arrive for so long; then answers are awaited.",
)
@click.option(
    "--input-tokens",
    metavar="N|LO:HI",
    type=_Parsed("tokens", Length.parse),
    default="256",
    help="Words of a synthetic prompt, about one token each: a number, or drawn from LO to HI.",
)
@click.option(
    "--output-tokens",
    metavar="N|LO:HI",
    type=_Parsed("tokens", Length.parse),
    default="64",
    help="Most tokens of an output: a number, or drawn from LO to HI.",
)
@click.option(
    "--dataset",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help='Prompts from a file of lines {"prompt": …} or {"messages": […]}, in its order, repeated if need be.',
)
@click.option("--endpoint", type=click.Choice(list(PATHS)), default="completions", help="The API that is called.")
@click.option("--model", help="Name of the model.  [default: the first that the server lists]")
@api_key_option
@click.option("--ignore-eos", is_flag=True, help="Ask for outputs of full length (vLLM, SGLang, Moiety).")
@click.option(
    "--extra", metavar="JSON", type=_Parsed("json", _json_object), help='Fields for every request: {"temperature": 0}.'
)
@click.option("--seed", type=int, default=0, help="Of arrivals, lengths and prompts.")
@click.option(
    "--warmup", type=click.IntRange(0, 65536), default=1, help="Requests before the measurement, all at once."
)
@request_timeout_option
@click.option(
    "--max-in-flight",
    type=click.IntRange(1, 1 << 20),
    default=4096,
    help="Most requests at once in an open loop. What arrives beyond is counted, not sent.",
)
@click.option(
    "--goodput",
    metavar="TARGETS",
    type=_Parsed("targets", targets),
    help="Count requests that meet all of these, such as ttft:500ms,itl:50ms; measures: ttft, itl, tpot, e2e.",
)
@json_option
@click.pass_context
def load(
    context: click.Context, /, json_file: Path | None, api_key: str | None, extra: str | None, **options: Any
) -> None:
    """Offer load to any server that speaks OpenAI's API, and measure what its clients see.

    URL is the server's address, such as http://127.0.0.1:50080, with or without /v1. Give one of --rate and --trace (open
    loop: requests are sent at their time, whatever has become of earlier ones) or --concurrency (closed loop). The
    report has rates, percentiles and failures by kind; --json FILE also has every request. Ctrl-C prints what has been
    measured so far.

    \b
    TTFT: from sending a request to the first chunk with output
    ITL:  every gap between two chunks of an output (for --goodput: the 99th percentile of a request's own)
    TPOT: from the first chunk to the last, by the tokens after the first, as the server counts them
    E2E:  from sending a request to the end of its answer

    Prompts differ from each other, so that no prefix cache helps; a trace's hash_ids and a repeated dataset do share text.
    The line `generator` says how late the generator itself was, and warns if that distorts the result: then run it on
    another machine, or several at once. Exit status 1 if no request succeeded.

    \b
    Examples:
      moiety bench load http://127.0.0.1:50080 --rate 4 --seconds 60 --goodput ttft:500ms,itl:50ms
      moiety bench load http://127.0.0.1:8000/v1 --concurrency 32 --requests 500 --input-tokens 128:1024 --ignore-eos
      moiety bench load http://10.0.0.7:30000 --trace mooncake.jsonl --speed 0.5 --json load.json
      moiety bench load http://127.0.0.1:50080 --rate 2 --dataset chats.jsonl --endpoint chat --extra '{"temperature": 0}'
    """
    from moiety.bench.load.report import load_json, load_lines
    from moiety.bench.load.run import LoadRun

    goodput = options.pop("goodput") or ()
    try:
        work = LoadWork(**options, goodput=goodput, extra=json.loads(extra) if extra else {})
    except InvalidRequest as error:
        raise click.UsageError(str(error), context) from None
    run = LoadRun(work, api_key, progress=progress())
    interruption: Interrupted | None = None
    try:
        run_async(run.run())
    except Interrupted as interrupted:
        interruption = interrupted
    report = run.report()
    if report is not None:
        click.echo(f"{work.url}, model {run.model}")
        for line in (*load_lines(report), f"rerun:     {invocation(context)}"):
            click.echo(line)
        write_json(json_file, {"url": work.url, "model": run.model, "rerun": invocation(context), **load_json(report)})
    if interruption is not None:
        raise interruption
    context.exit(0 if report is not None and report.ok else 1)
