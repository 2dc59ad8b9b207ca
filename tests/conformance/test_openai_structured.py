"""Structured output by pydantic with the package openai."""

from __future__ import annotations

import json
from typing import Any

import pydantic

from moiety.gateway.text.tokenizer import Tokenizer
from moiety.testing import FakeEngine
from support.doors import ChatDoor

ASK: list[Any] = [{"role": "user", "content": "Who?"}]


class Person(pydantic.BaseModel):
    """What the model must give."""

    name: str
    born: int


ADA = '{"name": "Ada", "born": 1815}'


async def test_an_answer_is_parsed_into_the_model(
    chat_door: ChatDoor, chat_tokenizer: Tokenizer, router: FakeEngine, connect: Any
):
    """The schema of the class guides the output, and the client parses it."""
    router.script = [*chat_tokenizer.encode(ADA, begin=False), chat_tokenizer.vocabulary["<|im_end|>"]]
    async with chat_door(router) as door, connect(door) as client:
        parsed = await client.chat.completions.parse(model="fake", messages=ASK, response_format=Person)
        options = {"model": "fake", "messages": ASK, "response_format": Person}
        async with client.chat.completions.stream(**options) as stream:
            streamed = await stream.get_final_completion()
    assert parsed.choices[0].message.parsed == Person(name="Ada", born=1815)
    assert streamed.choices[0].message.parsed == Person(name="Ada", born=1815)
    schema = json.loads(router.requests[0].sampling.guide.json_schema)
    assert schema["required"] == ["name", "born"]
    assert schema["additionalProperties"] is False
