"""`moiety generate`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from moiety.cli.run import run_async
from moiety.errors import Unavailable

if TYPE_CHECKING:
    from moiety.client import Chunk


class _TokenBias(click.ParamType[tuple[int, float]]):
    """Option type: a token id and the bias to add to the token's logit, as ID=BIAS."""

    name = "id=bias"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, float]:
        if isinstance(value, tuple):
            return value
        token, _, bias = str(value).partition("=")
        try:
            return int(token), float(bias)
        except ValueError:
            self.fail(f"{value!r}: must be ID=BIAS, such as 42=-100", param, ctx)


@click.command()
@click.argument("prompt")
@click.option(
    "--address", envvar="MOIETY_ADDRESS", show_envvar=True, default="127.0.0.1:50051", help="HOST:PORT of the gateway."
)
@click.option(
    "--max-tokens",
    type=click.IntRange(1, 2**32 - 1),
    help="Most tokens to generate, within the model's context.  [default: 128, or what is left of the context]",
)
@click.option(
    "--temperature",
    type=click.FloatRange(0, 10),
    help="0 picks the likeliest token (greedy); 1 samples from the model's own distribution.  [default: 0]",
)
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    help="Sample from the likeliest tokens whose probabilities add up to this.  [default: 1]",
)
@click.option(
    "--top-k",
    type=click.IntRange(0, 2**31 - 1),
    help="Sample from this many of the likeliest tokens; 0: from all.  [default: 0]",
)
@click.option(
    "--min-p",
    type=click.FloatRange(0, 1),
    help="Drop tokens less likely than this times the likeliest token.  [default: 0]",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**64 - 1),
    help="The same seed gives the same tokens.  [default: drawn for each request]",
)
@click.option("--n", type=click.IntRange(1, 16), help="Choices to generate, printed one after the other.  [default: 1]")
@click.option(
    "--repetition-penalty",
    type=click.FloatRange(0, 10, min_open=True),
    help="Above 1 makes tokens of the prompt and the output less likely.  [default: 1]",
)
@click.option(
    "--presence-penalty",
    type=click.FloatRange(-2, 2),
    help="Above 0 makes tokens of the output less likely, once each.  [default: 0]",
)
@click.option(
    "--frequency-penalty",
    type=click.FloatRange(-2, 2),
    help="Above 0 makes tokens of the output less likely, once per occurrence.  [default: 0]",
)
@click.option(
    "--logit-bias",
    type=_TokenBias(),
    multiple=True,
    help="Add BIAS, -100 to 100, to the logit of token ID. Repeatable.",
)
@click.option("--stop", metavar="TEXT", multiple=True, help="End the output before this text. Repeatable.")
@click.option(
    "--stop-token-id",
    "stop_token_ids",
    type=click.IntRange(0),
    multiple=True,
    help="End the output with this token. Repeatable.",
)
@click.option(
    "--min-tokens",
    type=click.IntRange(0, 2**32 - 1),
    help="Do not end the output before it has this many tokens.  [default: 0]",
)
@click.option(
    "--first-token",
    metavar="TOKEN",
    help="Text of the output's first token: a translation model's target language, such as fra_Latn.  "
    "[default: the checkpoint's forced_bos_token_id, if it has one]",
)
@click.option("--ignore-eos", is_flag=True, help="Continue after the end-of-sequence token.")
@click.option("--json-schema", type=click.File(), help="File with a JSON Schema that the output must match.")
@click.option("--regex", metavar="PATTERN", help="Regular expression (Rust's syntax) that the whole output must match.")
@click.option("--grammar", type=click.File(), help="File with a Lark grammar that the output must match.")
@click.option(
    "--logprobs",
    "top_logprobs",
    type=click.IntRange(0, 20),
    help="Print one line per token: choice, id, log probability, text, and this many of the likeliest tokens.",
)
@click.option("--prompt-logprobs", is_flag=True, help="First print the log probabilities of the prompt's tokens.")
@click.option("--token-ids", "as_ids", is_flag=True, help="Print token ids instead of text.")
@click.option("--priority", type=click.IntRange(-100, 100), default=0, help="Lower priorities run first.")
@click.option(
    "--tenant",
    default="",
    show_default=False,
    help="Tenants share capacity fairly and share no cached prefixes.  [default: no name]",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    help="Seconds for the whole request.  [default: no limit]",
)
@click.option(
    "--retries", type=click.IntRange(min=0), default=0, help="How often to try again when the gateway has no room."
)
def generate(prompt: str, address: str, as_ids: bool, top_logprobs: int | None, **options: Any) -> None:
    """Generate text from a running gateway.

    Prints tokens as they arrive. With --n above 1 and without --logprobs, prints one choice after the other at the end.
    Then prints token counts and times on stderr. PROMPT is the text to continue. If PROMPT is -, the text is read from
    stdin. Ctrl-C cancels the request.

    \b
    Examples:
      moiety generate "Each expert" --max-tokens 64 --stop "."
      moiety generate - --address gateway.example:50051 --temperature 0.7 --seed 1 < prompt.txt
      moiety generate "A name:" --temperature 1 --top-p 0.9 --n 3
      moiety generate "The capital is" --max-tokens 1 --logprobs 5
      moiety generate "Describe it as JSON: " --json-schema person.schema.json
      moiety generate "Is it open? " --regex "(yes|no)"
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    for name in ("json_schema", "grammar"):
        if options[name] is not None:
            options[name] = options[name].read()
    options["logit_bias"] = dict(options["logit_bias"])
    if top_logprobs is not None:
        options |= {"logprobs": True, "top_logprobs": top_logprobs}
    run_async(_stream(text, address, _Printer(as_ids, options["n"] or 1, top_logprobs is not None), options))


class _Printer:
    """Prints chunks as they arrive. Without `as_lines`, several choices are printed at the end, one after the other."""

    def __init__(self, as_ids: bool, choices: int, as_lines: bool):
        self._as_ids, self._as_lines = as_ids, as_lines
        self._waiting: list[list[str]] | None = [[] for _ in range(choices)] if choices > 1 and not as_lines else None

    def show(self, chunk: Chunk) -> None:
        if chunk.prompt_logprobs:
            click.echo("prompt " + " ".join(f"{value:.4f}" for value in chunk.prompt_logprobs))
        if self._as_lines:
            for line in _lines(chunk):
                click.echo(line)
            return
        text = "".join(f"{token} " for token in chunk.token_ids) if self._as_ids else chunk.text
        if self._waiting is None:
            click.echo(text, nl=False)
        else:
            self._waiting[chunk.choice].append(text)

    def end(self) -> None:
        if self._as_lines:
            return
        for choice, pieces in enumerate(self._waiting or ()):
            click.echo(f"[{choice}] {''.join(pieces)}")
        if self._waiting is None:
            click.echo()


def _lines(chunk: Chunk) -> Iterator[str]:
    """Yields one line per token of `chunk`. The last line also shows the text of the whole chunk."""
    for place, (token, logprob) in enumerate(zip(chunk.token_ids, chunk.logprobs, strict=True)):
        text = repr(chunk.text) if place + 1 == len(chunk.token_ids) else ""
        line = f"{chunk.choice:>2} {token:>7} {logprob:>9.4f}  {text:<16}"
        if chunk.top_logprobs:
            top = chunk.top_logprobs[place]
            line += "  " + " ".join(f"{i}:{value:.4f}" for i, value in zip(top.token_ids, top.logprobs, strict=True))
        yield line.rstrip()


async def _stream(prompt: str, address: str, printer: _Printer, options: dict[str, Any]) -> None:
    """Sends the request and prints the stream. `options` are the keyword arguments of `Client.generate`."""
    from moiety.client import Client

    began, first_token_s, reasons = time.monotonic(), 0.0, dict[int, str]()
    async with Client(address) as client:
        try:
            async for chunk in client.generate(prompt, **options):
                first_token_s = first_token_s or time.monotonic() - began
                printer.show(chunk)
                if chunk.finish_reason:
                    reasons[chunk.choice] = chunk.finish_reason
                last = chunk
        except Unavailable as error:
            raise Unavailable(f"gateway {address}: {error}") from None
    printer.end()
    if last.rerouted:
        click.echo(f"{last.rerouted:.1%} of the rows went to another expert than the model's choice", err=True)
    click.echo(
        f"{last.prompt_tokens} prompt tokens, {last.completion_tokens} new tokens, "
        f"finished by {', '.join(reason for _, reason in sorted(reasons.items()))}; "
        f"first token after {first_token_s:.2f} s, all after {time.monotonic() - began:.2f} s",
        err=True,
    )
