"""`moiety generate` against a running system."""

from __future__ import annotations

import asyncio
import io
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from moiety.client import Chunk, Client, Prompt

PROMPT = "Each expert group is a service"


def chunks_of(address: str, prompt: Prompt, **options: object) -> list[Chunk]:
    """Returns the chunks that the client gets for the same request."""

    async def collect() -> list[Chunk]:
        async with Client(address) as client:
            return [chunk async for chunk in client.generate(prompt, **options)]  # type: ignore[arg-type]

    return asyncio.run(collect())


def test_same_text_as_client(gateway: str, moiety: Callable) -> None:
    """stdout has the client's text and a line feed; stderr has the token counts."""
    chunks = chunks_of(gateway, PROMPT, max_tokens=12, ignore_eos=True)
    outcome = moiety("generate", PROMPT, "--address", gateway, "--max-tokens", "12", "--ignore-eos", "--retries", "2")
    assert outcome.status == 0
    assert outcome.out == "".join(chunk.text for chunk in chunks) + "\n"
    assert f"{chunks[-1].prompt_tokens} prompt tokens, 12 new tokens, finished by length" in outcome.err


def test_token_ids_sampled(gateway: str, moiety: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling options reach the system: seeded ids equal the client's. The address may come from the environment."""
    sampling = {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "seed": 7}
    chunks = chunks_of(gateway, PROMPT, max_tokens=8, ignore_eos=True, **sampling)
    monkeypatch.setenv("MOIETY_ADDRESS", gateway)
    flags = [word for name, value in sampling.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    outcome = moiety("generate", PROMPT, "--max-tokens", "8", "--ignore-eos", "--token-ids", *flags)
    assert outcome.out.split() == [str(token) for chunk in chunks for token in chunk.token_ids]


def test_every_option_reaches_the_system(gateway: str, moiety: Callable, tmp_path: Path) -> None:
    """Stop strings, choices, log probabilities, guides and biases have their effect on the output."""
    base = ["generate", PROMPT, "--address", gateway, "--temperature", "1", "--seed", "3"]
    whole = moiety(*base, "--max-tokens", "20", "--ignore-eos").out.removesuffix("\n")
    stop = whole[len(whole) // 2 :][:3]
    stopped = moiety(*base, "--max-tokens", "20", "--ignore-eos", "--stop", stop)
    assert stopped.out == whole[: whole.index(stop)] + "\n"
    assert "finished by stop" in stopped.err
    several = moiety(*base, "--max-tokens", "4", "--ignore-eos", "--n", "2", "--token-ids")
    assert [line[:4] for line in several.out.splitlines()] == ["[0] ", "[1] "]
    assert "8 new tokens, finished by length, length" in several.err
    lines = moiety(*base, "--max-tokens", "4", "--ignore-eos", "--logprobs", "2", "--prompt-logprobs").out.splitlines()
    assert lines[0].startswith("prompt -")
    assert [len(line.split("  ")[-1].split()) for line in lines[1:]] == [2] * 4
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": ["red", "blue"]}')
    assert moiety(*base, "--json-schema", str(schema)).out in ('"red"\n', '"blue"\n')
    assert moiety(*base, "--regex", "[xy]{3}").out.strip("xy") == "\n"
    biased = moiety(*base, "--max-tokens", "3", "--logit-bias", "42=100", "--token-ids", "--presence-penalty", "0")
    assert biased.out.split() == ["42"] * 3
    refused = moiety(*base, "--logit-bias", "42")
    assert refused.status == 2
    assert "must be ID=BIAS" in refused.err


def test_a_conversation_of_one_message(gateway: str, moiety: Callable) -> None:
    """--chat sends PROMPT through the chat template, after --system; the defaults are the publisher's; --model is checked."""
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": PROMPT}]
    chunks = chunks_of(gateway, messages, max_tokens=8, ignore_eos=True, recommended=True, seed=3)
    base = ["generate", PROMPT, "--address", gateway, "--max-tokens", "8", "--ignore-eos", "--seed", "3", "--token-ids"]
    chat = moiety(*base, "--chat", "--system", "Be kind.")
    assert chat.out.split() == [str(token) for chunk in chunks for token in chunk.token_ids]
    assert moiety(*base).out != chat.out
    refused = moiety(*base, "--system", "Be kind.")
    assert refused.status == 2
    assert "need --chat" in refused.err
    assert "is not served here" in moiety(*base, "--model", "other").err
    assert "must be a JSON object" in moiety(*base, "--chat", "--template-arguments", "[]").err


def test_prompt_from_stdin(gateway: str, moiety: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """`-` reads the prompt from stdin."""
    expected = moiety("generate", PROMPT, "--address", gateway, "--max-tokens", "4")
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    assert moiety("generate", "-", "--address", gateway, "--max-tokens", "4").out == expected.out


def test_refusal_is_reported(gateway: str, moiety: Callable) -> None:
    """A refused request prints the gateway's message, with field, value and bound."""
    outcome = moiety("generate", PROMPT, "--address", gateway, "--max-tokens", "100000")
    assert outcome.status == 1
    assert outcome.err.startswith("error: sampling.max_tokens = 100000: must be 1 to ")


def test_no_gateway(moiety: Callable) -> None:
    """If no gateway listens, the error names the address."""
    outcome = moiety("generate", PROMPT, "--address", "127.0.0.1:1")
    assert outcome.status == 1
    assert outcome.err.startswith("error: gateway 127.0.0.1:1: ")
    assert outcome.err.count("\n") == 1


def test_deadline(gateway: str, moiety: Callable) -> None:
    """A request that takes longer than `--timeout` ends with an error."""
    outcome = moiety(
        "generate", PROMPT, "--address", gateway, "--max-tokens", "400", "--ignore-eos", "--timeout", "0.2"
    )
    assert outcome.status == 1
    assert outcome.err.startswith("error: ")


def test_ctrl_c_cancels(gateway: str, moiety: Callable, moiety_process: Callable) -> None:
    """Ctrl-C during a stream ends the command with status 130 and no traceback; the system continues to serve."""
    words = ["generate", PROMPT, "--address", gateway, "--max-tokens", "400", "--ignore-eos", "--token-ids"]
    process = moiety_process(*words)
    assert process.stdout.read(1)  # a token has arrived
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert err.strip() == "interrupted by SIGINT"
    assert moiety("generate", PROMPT, "--address", gateway, "--max-tokens", "2").status == 0
