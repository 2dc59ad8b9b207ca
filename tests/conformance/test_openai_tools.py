"""Tools with the package openai."""

from __future__ import annotations

import json
from typing import Any

from moiety.gateway.text.tokenizer import Tokenizer
from moiety.testing import FakeEngine
from support.doors import ChatDoor

ASK: list[Any] = [{"role": "user", "content": "Weather in Rome and Oslo?"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: list[Any] = [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}]
CALLS = "\n".join(
    f'<tool_call>\n{{"name": "weather", "arguments": {{"city": "{city}"}}}}\n</tool_call>' for city in ("Rome", "Oslo")
)


def write(router: FakeEngine, tokenizer: Tokenizer, text: str) -> None:
    """Makes the router's model write `text`."""
    router.script = [*tokenizer.encode(text, begin=False), tokenizer.vocabulary["<|im_end|>"]]


async def test_a_conversation_with_tools(
    chat_door: ChatDoor, chat_tokenizer: Tokenizer, router: FakeEngine, connect: Any
):
    """Calls come back typed, and the conversation goes on with their results."""
    write(router, chat_tokenizer, CALLS)
    async with chat_door(router) as door, connect(door) as client:
        chat = await client.chat.completions.create(model="fake", messages=ASK, tools=TOOLS, tool_choice="auto")
        (choice,) = chat.choices
        assert choice.finish_reason == "tool_calls"
        calls = choice.message.tool_calls
        assert [json.loads(call.function.arguments)["city"] for call in calls] == ["Rome", "Oslo"]
        results = [{"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in calls]
        write(router, chat_tokenizer, "Sunny in both.")
        messages = [*ASK, choice.message.model_dump(exclude_none=True), *results]
        final = await client.chat.completions.create(model="fake", messages=messages, tools=TOOLS)
    assert final.choices[0].message.content == "Sunny in both."
    assert final.choices[0].finish_reason == "stop"
    prompt = chat_tokenizer.decode(router.requests[-1].prompt_ids, special=True)
    assert prompt.count("<tool_response>\nsunny") == 2


async def test_streamed_calls_join_to_the_same(
    chat_door: ChatDoor, chat_tokenizer: Tokenizer, router: FakeEngine, connect: Any
):
    """The client's own stream helper puts the calls together."""
    write(router, chat_tokenizer, "I ask.\n" + CALLS)
    async with (
        chat_door(router) as door,
        connect(door) as client,
        client.chat.completions.stream(model="fake", messages=ASK, tools=TOOLS) as stream,
    ):
        kinds = {event.type async for event in stream}
        final = await stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in kinds
    message = final.choices[0].message
    assert message.content == "I ask."
    assert [json.loads(call.function.arguments)["city"] for call in message.tool_calls] == ["Rome", "Oslo"]
    assert len({call.id for call in message.tool_calls}) == 2


async def test_a_forced_call_sends_a_guide(
    chat_door: ChatDoor, chat_tokenizer: Tokenizer, router: FakeEngine, connect: Any
):
    """tool_choice by name reaches the router as a grammar, and the call comes back."""
    write(router, chat_tokenizer, CALLS.split("</tool_call>")[0] + "</tool_call>")
    named = {"type": "function", "function": {"name": "weather"}}
    async with chat_door(router) as door, connect(door) as client:
        chat = await client.chat.completions.create(model="fake", messages=ASK, tools=TOOLS, tool_choice=named)
    assert "weather" in router.requests[0].sampling.guide.grammar
    assert [call.function.name for call in chat.choices[0].message.tool_calls] == ["weather"]
