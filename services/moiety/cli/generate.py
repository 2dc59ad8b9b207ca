"""`moiety generate`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from moiety.cli.options import TOKEN_BIAS
from moiety.cli.run import run_async
from moiety.errors import Unavailable

if TYPE_CHECKING:
    from moiety.client import Chunk


@click.command()
@click.argument("prompt")
@click.option(
    "--address",
    envvar="MOIETY_ADDRESS",
    show_envvar=True,
    default="127.0.0.1:50051",
    show_default=True,
    help="HOST:PORT of a gateway.",
)
@click.option(
    "--max-tokens", type=click.IntRange(1, 2**32 - 1), help="Within the model's context; default 128, or what is left."
)
@click.option("--temperature", type=click.FloatRange(0, 10), help="0, the default, is greedy; 1 is the model's own.")
@click.option(
    "--top-p", type=click.FloatRange(0, 1, min_open=True), help="Sample from the likeliest that have this share."
)
@click.option("--top-k", type=click.IntRange(0, 2**31 - 1), help="Sample from this many; default 0, all.")
@click.option("--min-p", type=click.FloatRange(0, 1), help="Drop tokens less likely than this times the likeliest.")
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), help="Same seed, same tokens; default: drawn.")
@click.option("--n", type=click.IntRange(1, 16), help="Choices of the one prompt; printed one after the other.")
@click.option(
    "--repetition-penalty",
    type=click.FloatRange(0, 10, min_open=True),
    help="Above 1 disfavours tokens of prompt and output.",
)
@click.option("--presence-penalty", type=click.FloatRange(-2, 2), help="Above 0 disfavours tokens of the output.")
@click.option("--frequency-penalty", type=click.FloatRange(-2, 2), help="The same, once for each occurrence.")
@click.option("--logit-bias", type=TOKEN_BIAS, multiple=True, help="Add BIAS, -100 to 100, to a token. Repeatable.")
@click.option("--stop", metavar="TEXT", multiple=True, help="End before this text. Repeatable.")
@click.option(
    "--stop-token-id", "stop_token_ids", type=click.IntRange(0), multiple=True, help="End with this token. Repeatable."
)
@click.option("--min-tokens", type=click.IntRange(0, 2**32 - 1), help="Nothing ends the text before.")
@click.option(
    "--first-token", metavar="TOKEN", help="The output begins with this token: a target language, fra_Latn say."
)
@click.option("--ignore-eos", is_flag=True, help="Go on after the end of the text.")
@click.option("--json-schema", type=click.File(), help="The output is JSON that this JSON Schema accepts.")
@click.option("--regex", metavar="PATTERN", help="The output matches this, all of it (Rust's regex syntax).")
@click.option("--grammar", type=click.File(), help="The output is of this Lark grammar.")
@click.option(
    "--logprobs",
    "top_logprobs",
    type=click.IntRange(0, 20),
    help="Print a line for each token: choice, id, log probability, text, and this many of the likeliest.",
)
@click.option("--prompt-logprobs", is_flag=True, help="Print the prompt's log probabilities first.")
@click.option("--token-ids", "as_ids", is_flag=True, help="Print token ids instead of text.")
@click.option("--priority", type=click.IntRange(-100, 100), default=0, help="Lower runs first; default 0.")
@click.option("--tenant", default="", help="Whose capacity and cached prefixes it uses.")
@click.option(
    "--timeout", "timeout_s", type=click.FloatRange(min=0, min_open=True), help="Seconds for all of it; default: none."
)
@click.option(
    "--retries", type=click.IntRange(min=0), default=0, help="Tries again that often where there is no room; default 0."
)
def generate(prompt: str, address: str, as_ids: bool, top_logprobs: int | None, **options: Any) -> None:
    """Generate text from a running gateway.

    Tokens are printed as they come, usage on stderr at the end. PROMPT is the text to go on from; - reads it from stdin.
    Ctrl-C cancels the request.

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
    """Chunks to stdout: a single choice as it comes, several one after the other, once each is whole."""

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
    """One for each token. A chunk's text stands beside its last token: it may be that of several."""
    for place, (token, logprob) in enumerate(zip(chunk.token_ids, chunk.logprobs, strict=True)):
        text = repr(chunk.text) if place + 1 == len(chunk.token_ids) else ""
        line = f"{chunk.choice:>2} {token:>7} {logprob:>9.4f}  {text:<16}"
        if chunk.top_logprobs:
            top = chunk.top_logprobs[place]
            line += "  " + " ".join(f"{i}:{value:.4f}" for i, value in zip(top.token_ids, top.logprobs, strict=True))
        yield line.rstrip()


async def _stream(prompt: str, address: str, printer: _Printer, options: dict[str, Any]) -> None:
    """`options` are those of `Client.generate`."""
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
        click.echo(f"{last.rerouted:.1%} of its rows went to another expert than the model's choice", err=True)
    click.echo(
        f"{last.prompt_tokens} prompt tokens, {last.completion_tokens} new tokens, "
        f"finished by {', '.join(reason for _, reason in sorted(reasons.items()))}; "
        f"first token after {first_token_s:.2f} s, all after {time.monotonic() - began:.2f} s",
        err=True,
    )
