"""`moiety generate`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from moiety.cli.arguments import Text, TextFile
from moiety.cli.generation_options import chat_options, gateway_options, request_options, sampling_options
from moiety.cli.run import run_async
from moiety.core.text import for_terminal

if TYPE_CHECKING:
    from moiety.client import Chunk, Prompt


@click.command()
@click.argument("prompt", type=Text())
@gateway_options
@click.option("--chat", is_flag=True, help="PROMPT is the user's message; the checkpoint's chat template is used.")
@chat_options
@sampling_options
@click.option("--n", type=click.IntRange(1, 16), help="Choices to generate, printed one after the other.  [default: 1]")
@click.option(
    "--first-token",
    type=Text(),
    metavar="TOKEN",
    help="Text of the output's first token: a translation model's target language, such as fra_Latn.  "
    "[default: the checkpoint's forced_bos_token_id, if it has one]",
)
@click.option("--ignore-eos", is_flag=True, help="Continue after the end-of-sequence token.")
@click.option("--json-schema", type=TextFile(), help="File with a JSON Schema that the output must match.")
@click.option(
    "--regex",
    type=Text(),
    metavar="PATTERN",
    help="Regular expression (Rust's syntax) that the whole output must match.",
)
@click.option("--grammar", type=TextFile(), help="File with a Lark grammar that the output must match.")
@click.option(
    "--logprobs",
    "top_logprobs",
    type=click.IntRange(0, 20),
    help="Print one line per token: choice, id, log probability, text, and this many of the likeliest tokens.",
)
@click.option("--prompt-logprobs", is_flag=True, help="First print the log probabilities of the prompt's tokens.")
@click.option("--token-ids", "as_ids", is_flag=True, help="Print token ids instead of text.")
@request_options
def generate(
    prompt: str,
    address: str,
    chat: bool,
    system: str | None,
    as_ids: bool,
    top_logprobs: int | None,
    **options: Any,
) -> None:
    """Generate text from a running gateway.

    Prints tokens as they arrive. With --n above 1 and without --logprobs, prints one choice after the other at the end.
    Then prints token counts and times on stderr. PROMPT is the text to continue. If PROMPT is -, the text is read from
    stdin. Ctrl-C cancels the request.

    With --chat, PROMPT is the user's message in a conversation, and the output is the reply. Options that you leave out
    are then as the model's publisher recommends, and the reply may fill the context.

    \b
    Examples:
      moiety generate "Each expert" --max-tokens 64 --stop "."
      moiety generate - --address gateway.example:50051 --temperature 0.7 --seed 1 < prompt.txt
      moiety generate "A name:" --temperature 1 --top-p 0.9 --n 3
      moiety generate "The capital is" --max-tokens 1 --logprobs 5
      moiety generate "Describe it as JSON: " --json-schema person.schema.json
      moiety generate "Is it open? " --regex "(yes|no)"
      moiety generate "What is an expert?" --chat --system "Answer in one sentence."
    """
    if not chat and (system is not None or options["template_arguments"] is not None):
        raise click.UsageError("--system and --template-arguments need --chat")
    text = sys.stdin.read() if prompt == "-" else prompt
    options["logit_bias"] = dict(options["logit_bias"])
    if top_logprobs is not None:
        options |= {"logprobs": True, "top_logprobs": top_logprobs}
    printer = _Printer(as_ids, options["n"] or 1, top_logprobs is not None)
    run_async(_stream(_messages(system, text) if chat else text, address, printer, options | {"recommended": chat}))


def _messages(system: str | None, text: str) -> list[dict[str, str]]:
    """Returns a conversation of one message."""
    first = [{"role": "system", "content": system}] if system is not None else []
    return [*first, {"role": "user", "content": text}]


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
        text = for_terminal(text) if sys.stdout.isatty() else text
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


async def _stream(prompt: Prompt, address: str, printer: _Printer, options: dict[str, Any]) -> None:
    """Sends the request and prints the stream. `options` are the keyword arguments of `Client.generate`."""
    from moiety.client import Client

    began, first_token_s, reasons = time.monotonic(), 0.0, dict[int, str]()
    async with Client(address) as client:
        async for chunk in client.generate(prompt, **options):
            first_token_s = first_token_s or time.monotonic() - began
            printer.show(chunk)
            if chunk.finish_reason:
                reasons[chunk.choice] = chunk.finish_reason
            last = chunk
    printer.end()
    if last.rerouted:
        click.echo(f"{last.rerouted:.1%} of the rows went to another expert than the model's choice", err=True)
    click.echo(
        f"{last.prompt_tokens} prompt tokens, {last.completion_tokens} new tokens, "
        f"finished by {', '.join(reason for _, reason in sorted(reasons.items()))}; "
        f"first token after {first_token_s:.2f} s, all after {time.monotonic() - began:.2f} s",
        err=True,
    )
