"""`moiety generate`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from moiety.cli.arguments import Text, TextFile
from moiety.cli.generation_options import (
    DEFAULT_ADDRESS,
    chat_options,
    gateway_options,
    request_options,
    sampling_options,
)
from moiety.cli.json_output import json_output_option, print_json
from moiety.cli.local_system import GatewayAddress, gateway_address
from moiety.cli.run import run_async
from moiety.core.text import for_terminal
from moiety.errors import Unavailable

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
@json_output_option
def generate(
    prompt: str,
    address: str | None,
    app: str | None,
    chat: bool,
    system: str | None,
    as_ids: bool,
    top_logprobs: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Generate text from a running gateway.

    Prints tokens as they arrive. With --n above 1 and without --logprobs, prints one choice after the other at the end.
    Then prints token counts and times on stderr. PROMPT is the text to continue. If PROMPT is -, the text is read from
    stdin. Ctrl-C cancels the request. Without --address, the gateway is that of the system on this machine.

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
      moiety generate "Each expert" --json | jq -r .choices[0].text
    """
    if not chat and (system is not None or options["template_arguments"] is not None):
        raise click.UsageError("--system and --template-arguments need --chat")
    text = sys.stdin.read() if prompt == "-" else prompt
    options["logit_bias"] = dict(options["logit_bias"])
    if top_logprobs is not None:
        options |= {"logprobs": True, "top_logprobs": top_logprobs}
    printer = None if as_json else _Printer(as_ids, options["n"] or 1, top_logprobs is not None)
    work = _stream(
        _messages(system, text) if chat else text,
        gateway_address(address, app, DEFAULT_ADDRESS),
        printer,
        options | {"recommended": chat},
    )
    whole = run_async(work)
    if as_json:
        print_json(whole)


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


async def _stream(
    prompt: Prompt, gateway: GatewayAddress, printer: _Printer | None, options: dict[str, Any]
) -> dict[str, Any]:
    """Sends the request and prints the stream as it comes. `options` are the keyword arguments of `Client.generate`.

    Returns the whole as JSON types: the fields of `client.Completion`, and seconds.
    """
    from moiety.client import Client, completion_of

    chunks: list[Chunk] = []
    began, first_token_s = time.monotonic(), 0.0
    async with Client(gateway.address) as client:
        try:
            async for chunk in client.generate(prompt, **options):
                first_token_s = first_token_s or time.monotonic() - began
                chunks.append(chunk)
                if printer is not None:
                    printer.show(chunk)
        except Unavailable as error:
            raise Unavailable(f"{error}{gateway.hint}") from None
    if printer is not None:
        printer.end()
    whole, all_s = completion_of(chunks), time.monotonic() - began
    if whole.rerouted:
        click.echo(f"{whole.rerouted:.1%} of the rows went to another expert than the model's choice", err=True)
    click.echo(
        f"{whole.prompt_tokens} prompt tokens, {whole.completion_tokens} new tokens, "
        f"finished by {', '.join(str(choice.finish_reason) for choice in whole.choices)}; "
        f"first token after {first_token_s:.2f} s, all after {all_s:.2f} s",
        err=True,
    )
    return {**asdict(whole), "first_token_s": first_token_s, "all_s": all_s}
