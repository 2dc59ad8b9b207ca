"""A gateway with `skip_tokenizer`: token ids in and out over both doors, and text refused with that reason."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from gateway_support import PROMPT, SHAPE, chunks, expected

from moiety.core.sampling import Guide, GuideKind
from moiety.errors import InvalidRequest
from moiety.gateway.text.tokenizer import Tokenizer
from moiety.testing import FakeEngine
from support.doors import Door, door_over

REASON = "this gateway has no tokenizer"


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[Door]:
    """A gateway of a checkpoint without a tokenizer, whose config names end 7."""
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    async with door_over(Tokenizer(str(tmp_path), skip=True), FakeEngine("a", SHAPE)) as opened:
        yield opened


async def test_ids_come_back_as_ids(door: Door):
    """Tokens, ends and log probabilities are served without a text, with ids in the place of tokens' names."""
    body = {"prompt": PROMPT, "max_tokens": 6, "seed": 0, "logprobs": 1}
    (choice,) = (await door.post("/v1/completions", **body))["choices"]
    streamed = await door.events("/v1/completions", **body)
    got = await chunks(door.gateway, PROMPT, max_tokens=6, logprobs=True, top_logprobs=1)
    assert choice["token_ids"] == [token for chunk in got for token in chunk.token_ids] == expected(6)
    assert [token for event in streamed for token in event["choices"][0]["token_ids"]] == expected(6)
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in expected(6)]
    assert choice["text"] == "".join(chunk.text for chunk in got) == ""
    assert sum(len(chunk.logprobs) for chunk in got) == 6


async def test_the_checkpoint_still_says_what_ends_an_output(door: Door, tmp_path: Path):
    """End-of-sequence ids come from config.json, or generation_config.json, alone."""
    await chunks(door.gateway, PROMPT, max_tokens=2)
    assert Tokenizer(str(tmp_path), skip=True).stop_ids == (7,)


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ("text", {}),
        ([{"role": "user", "content": "hi"}], {}),
        (PROMPT, {"stop": ("a",)}),
        (PROMPT, {"guide": Guide(GuideKind.REGEX, "a")}),
        (PROMPT, {"first_token": "a"}),
    ],
    ids=["text", "chat", "stop", "guide", "first token"],
)
async def test_what_needs_text_is_refused_over_grpc(door: Door, prompt: Any, options: dict[str, Any]):
    """The error says why and what to send instead."""
    guide = options.pop("guide", None)
    more = {guide.kind: guide.text} if guide else {}
    with pytest.raises(InvalidRequest, match=REASON):
        await chunks(door.gateway, prompt, **options, **more)


@pytest.mark.parametrize(
    ("path", "field", "body"),
    [
        ("/v1/completions", "prompt", {"prompt": "text"}),
        ("/v1/completions", "stop", {"prompt": PROMPT, "stop": ["a"]}),
        ("/v1/completions", "guided_regex", {"prompt": PROMPT, "guided_regex": "a"}),
        ("/v1/chat/completions", "messages", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/tokenize", "prompt", {"prompt": "text"}),
        ("/detokenize", "tokens", {"tokens": [5]}),
    ],
    ids=["text", "stop", "guide", "chat", "tokenize", "detokenize"],
)
async def test_what_needs_text_is_refused_over_http(door: Door, path: str, field: str, body: dict[str, Any]):
    """The error names the client's field and says why."""
    error = await door.refused(path, 400, **body)
    assert error["param"] == field
    assert REASON in error["message"]
