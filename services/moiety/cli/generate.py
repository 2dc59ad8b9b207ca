"""`moiety generate`."""

from __future__ import annotations

import sys
import time
from typing import Any

import click

from moiety.cli.run import run_async
from moiety.errors import Unavailable


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
@click.option("--temperature", type=click.FloatRange(0, 10), help="0, the default, is greedy.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Probability to sample from; default 1.")
@click.option("--top-k", type=click.IntRange(0, 2**31 - 1), help="Tokens to sample from; default 0, all.")
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), help="Same seed, same tokens; default: drawn.")
@click.option("--ignore-eos", is_flag=True, help="Go on after the end of the text.")
@click.option("--token-ids", "as_ids", is_flag=True, help="Print token ids instead of text.")
@click.option(
    "--timeout", "timeout_s", type=click.FloatRange(min=0, min_open=True), help="Seconds for all of it; default: none."
)
@click.option("--priority", type=click.IntRange(-100, 100), default=0, help="Lower runs first; default 0.")
@click.option("--tenant", default="", help="Whose share of a full system the request uses.")
@click.option(
    "--retries", type=click.IntRange(min=0), default=0, help="Tries again that often where there is no room; default 0."
)
def generate(prompt: str, address: str, as_ids: bool, **options: Any) -> None:
    """Generate text from a running gateway.

    Tokens are printed as they come, usage on stderr at the end. PROMPT is the text to go on from; - reads it from stdin.
    Ctrl-C cancels the request.

    \b
    Examples:
      moiety generate "Each expert" --max-tokens 64
      moiety generate - --address gateway.example:50051 --temperature 0.7 --seed 1 < prompt.txt
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    run_async(_stream(text, address, as_ids, options))


async def _stream(prompt: str, address: str, as_ids: bool, options: dict[str, Any]) -> None:
    """`options` are those of `Client.generate`."""
    from moiety.client import Client

    began, first_token_s = time.monotonic(), 0.0
    async with Client(address) as client:
        try:
            async for chunk in client.generate(prompt, **options):
                first_token_s = first_token_s or time.monotonic() - began
                click.echo("".join(f"{token} " for token in chunk.token_ids) if as_ids else chunk.text, nl=False)
                last = chunk
        except Unavailable as error:
            raise Unavailable(f"gateway {address}: {error}") from None
    click.echo()
    click.echo(
        f"{last.prompt_tokens} prompt tokens, {last.completion_tokens} new tokens, finished by {last.finish_reason}; "
        f"first token after {first_token_s:.2f} s, all after {time.monotonic() - began:.2f} s",
        err=True,
    )
