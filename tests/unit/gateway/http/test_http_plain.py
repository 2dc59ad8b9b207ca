"""What needs no generation: models, versions, tokens and texts, and the description of the API."""

from __future__ import annotations

import re

import pytest
from gateway_support import SHAPE

import moiety
from moiety.errors import ConfigError
from moiety.gateway.http.app import build_app
from moiety.gateway.text.tokenizer import Tokenizer
from moiety.testing import SYSTEM, FakeEngine
from support.doors import ChatDoor, door_over


async def test_models_are_listed_and_described(tokenizer: Tokenizer):
    """The served model has its name, revision and context."""
    async with door_over(tokenizer, FakeEngine("a", SHAPE)) as door:
        listed = (await door.http.get("/v1/models")).json()
        single = (await door.http.get("/v1/models/fake")).json()
        version = (await door.http.get("/version")).json()
    assert listed == {"object": "list", "data": [single]}
    assert (single["id"], single["object"]) == ("fake", "model")
    assert (single["max_model_len"], single["revision"]) == (SHAPE.max_context, SYSTEM.revision)
    assert version == {"version": moiety.__version__}


async def test_texts_become_tokens_and_tokens_texts(tokenizer: Tokenizer):
    """Both ways, with the strings of tokens, also for texts that are too long to be prompts."""
    text = "hello there, é€"
    async with door_over(tokenizer, FakeEngine("a", SHAPE)) as door:
        made = await door.post("/tokenize", prompt=text, return_token_strs=True)
        back = await door.post("/detokenize", tokens=made["tokens"])
        long = await door.post("/tokenize", prompt=text * 1000)
        for tokens in ([10**6], [-1], "a"):
            assert (await door.refused("/detokenize", 400, tokens=tokens))["param"] in ("tokens", "token_ids")
        assert (await door.refused("/tokenize", 400))["param"] == "prompt"
        assert (await door.refused("/tokenize", 404, prompt="a", model="x"))["code"] == "model_not_found"
    assert made["tokens"] == tokenizer.encode(text)
    assert made["count"] == len(made["tokens"]) == len(made["token_strs"])
    assert made["max_model_len"] == SHAPE.max_context
    assert back == {"prompt": text}
    assert long["count"] > SHAPE.max_context


async def test_a_conversation_has_the_tokens_that_chat_gives_the_router(chat_door: ChatDoor, chat_tokenizer: Tokenizer):
    """/tokenize renders messages as /v1/chat/completions does."""
    async with chat_door(FakeEngine("a", SHAPE)) as door:
        made = await door.post("/tokenize", messages=[{"role": "user", "content": "Hi"}])
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert made["tokens"] == chat_tokenizer.encode(text, begin=False)


async def test_the_api_describes_itself(tokenizer: Tokenizer):
    """The document names every path and field; the page shows them and loads nothing from elsewhere."""
    async with door_over(tokenizer, FakeEngine("a", SHAPE)) as door:
        document = (await door.http.get("/openapi.json")).json()
        page = await door.http.get("/docs")
    schemas = document["components"]["schemas"]
    assert {"prompt", "echo", "top_k", "return_token_ids"} <= schemas["CompletionBody"]["properties"].keys()
    assert "messages" in schemas["ChatBody"]["required"]
    used = set(re.findall(r'"#/components/schemas/(\w+)"', str(document).replace("'", '"')))
    assert used <= schemas.keys()
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert all(path.replace("{", "{") in page.text for path in document["paths"])
    assert not re.findall(r"(?:src|href)=\"(?:https?:)?//", page.text)


async def test_an_unknown_format_is_a_wrong_setting(tokenizer: Tokenizer):
    """The error names the setting and the formats."""
    async with door_over(tokenizer, FakeEngine("a", SHAPE)) as door:
        with pytest.raises(ConfigError, match="hermes"):
            build_app(door.gateway.core, formats="unknown")
