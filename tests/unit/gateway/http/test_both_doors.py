"""Both doors lead to the same core: the same request gives the same text, tokens and ends over gRPC and HTTP."""

from __future__ import annotations

from typing import Any

import pytest
from gateway_support import SHAPE, chunks

from moiety.gateway.text.tokenizer import Tokenizer
from moiety.testing import FakeEngine
from support.doors import Door, door_over

CASES: list[dict[str, Any]] = [
    {"prompt": [5, 6, 7], "max_tokens": 20},
    {"prompt": "hello there", "max_tokens": 20, "n": 3},
    {"prompt": "é€ and", "max_tokens": 30, "seed": 7},
    {"prompt": "stop it", "max_tokens": 30, "stop": ["e", "M"]},
    {"prompt": [9], "max_tokens": 12, "stop": ["a"], "min_tokens": 6, "n": 2},
    {"prompt": "scores", "max_tokens": 8, "top_logprobs": 3, "logprobs": True},
]


async def over_grpc(door: Door, prompt: Any, **options: Any) -> list[tuple[str, list[int], str]]:
    """Each choice's text, tokens and reason."""
    got: dict[int, tuple[str, list[int], str]] = {}
    for chunk in await chunks(door.gateway, prompt, temperature=0.5, **options):
        text, tokens, _ = got.get(chunk.choice, ("", [], ""))
        got[chunk.choice] = (text + chunk.text, tokens + list(chunk.token_ids), str(chunk.finish_reason or ""))
    return [got[choice] for choice in sorted(got)]


async def over_http(door: Door, *, stream: bool, **options: Any) -> list[tuple[str, list[int], str]]:
    """Each choice's text, tokens and reason."""
    body = {"temperature": 0.5, "return_token_ids": True, "seed": 0, **options}
    if "top_logprobs" in body:
        body["logprobs"] = body.pop("top_logprobs")
    if not stream:
        choices = (await door.post("/v1/completions", **body))["choices"]
        return [(choice["text"], choice["token_ids"], choice["finish_reason"]) for choice in choices]
    got: dict[int, tuple[str, list[int], str]] = {}
    for event in await door.events("/v1/completions", **body):
        (choice,) = event["choices"]
        text, tokens, _ = got.get(choice["index"], ("", [], ""))
        reason = choice["finish_reason"] or ""
        got[choice["index"]] = (text + choice["text"], tokens + choice["token_ids"], reason)
    return [got[choice] for choice in sorted(got)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["prompt"]))
async def test_a_request_gives_the_same_through_both_doors(tokenizer: Tokenizer, case: dict[str, Any]):
    """Text, tokens and finish reasons agree between gRPC, HTTP and HTTP streams."""
    async with door_over(tokenizer, FakeEngine("a", SHAPE)) as door:
        first = await over_grpc(door, **case)
        assert await over_http(door, stream=False, **case) == first
        assert await over_http(door, stream=True, **case) == first
    assert all(text and tokens and reason for text, tokens, reason in first)
