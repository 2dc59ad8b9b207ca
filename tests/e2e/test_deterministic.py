"""The `deterministic` setting through the whole system: other requests change no bit, in float32 and in bfloat16."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest

from moiety.client import Client
from moiety.local.cluster import LocalCluster

PROMPTS = [[3 + (7 * i + 5 * j) % 300 for j in range(length)] for i, length in enumerate((40, 3, 17, 60, 9, 25, 33, 8))]
NEW_TOKENS = 16


async def answer(client: Client, prompt: Sequence[int]) -> tuple[list[int], list[float]]:
    """Returns the new tokens, and the log probabilities of prompt and output."""
    options = {"max_tokens": NEW_TOKENS, "ignore_eos": True, "logprobs": True, "prompt_logprobs": True}
    chunks = [chunk async for chunk in client.generate(prompt, **options)]  # type: ignore[arg-type]
    logprobs = [value for chunk in chunks for value in (*chunk.prompt_logprobs, *chunk.logprobs)]
    return [token for chunk in chunks for token in chunk.token_ids], logprobs


@pytest.mark.slow  # each architecture starts its own system
@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        ("deepseek_v3", "bfloat16"),
        ("qwen2_moe", "bfloat16"),
        ("gpt_oss", "bfloat16"),
        ("deepseek_v3", "float32"),  # torch's products depend on the batch here: without the setting this fails
    ],
)
async def test_no_bit_depends_on_the_batch(architecture: str, dtype: str, tiny: Callable[[str], str]) -> None:
    """A request in small chunks has the same log probabilities to the last bit, alone and beside seven others."""
    router = {"token_budget": 24, "slots": 8, "prefix_cache": False}
    options = {"groups": 2, "dtype": dtype, "deterministic": True, "router": router}
    async with LocalCluster(tiny(architecture), **options) as cluster, Client(cluster.address) as client:  # type: ignore[arg-type]
        alone = [await answer(client, prompt) for prompt in PROMPTS]
        together = await asyncio.gather(*(answer(client, prompt) for prompt in PROMPTS))
    assert all(len(logprobs) == len(p) - 1 + NEW_TOKENS for p, (_, logprobs) in zip(PROMPTS, alone, strict=True))
    assert list(together) == alone
