"""Tools over HTTP: what the model writes becomes calls, and a forced call is a guide."""

from __future__ import annotations

import json
from typing import Any

import jsonschema

from moiety.gateway.text.tokenizer import Tokenizer
from moiety.router.sequence.guides import Guides, allowed_tokens
from moiety.testing import FakeEngine, fake_shape
from support.doors import ChatDoor, Door, door_over

PATH = "/v1/chat/completions"
ASK = [{"role": "user", "content": "Weather?"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 4}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Tells.", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}},
]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
CLOCK = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'


def writes(tokenizer: Tokenizer, text: str) -> FakeEngine:
    """A router whose model writes `text` and then ends."""
    engine = FakeEngine("a", fake_shape(max_context=2048))
    engine.script = [*tokenizer.encode(text, begin=False), tokenizer.vocabulary["<|im_end|>"]]
    return engine


async def joined(door: Door, **body: object) -> dict[str, Any]:
    """Streams an answer; returns its message as a client joins it, with its last finish_reason."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "calls": {}}
    for event in await door.events(PATH, **body):
        (choice,) = event["choices"]
        for name in ("content", "reasoning_content"):
            message[name] += choice["delta"].get(name) or ""
        for call in choice["delta"].get("tool_calls", ()):
            known = message["calls"].setdefault(call["index"], {"id": "", "name": "", "arguments": ""})
            known["id"] += call.get("id", "")
            known["name"] += call["function"].get("name", "")
            known["arguments"] += call["function"]["arguments"]
        message["finish"] = choice["finish_reason"]
    return message


async def test_calls_become_tool_calls(chat_door: ChatDoor, chat_tokenizer: Tokenizer):
    """Content before a call stays, parallel calls are numbered, and the reason is tool_calls; streamed it is the same."""
    router = writes(chat_tokenizer, f"I look.\n{CALL}\n{CLOCK}")
    async with chat_door(router) as door:
        answer = await door.post(PATH, messages=ASK, tools=TOOLS)
        streamed = await joined(door, messages=ASK, tools=TOOLS)
    (choice,) = answer["choices"]
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert message["content"] == "I look."
    calls = [(call["type"], call["function"]["name"]) for call in message["tool_calls"]]
    assert calls == [("function", "weather"), ("function", "clock")]
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"city": "Rome"}
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    assert streamed["finish"] == "tool_calls"
    assert streamed["content"] == "I look."
    assert [(call["name"], json.loads(call["arguments"])) for call in streamed["calls"].values()] == [
        ("weather", {"city": "Rome"}),
        ("clock", {}),
    ]


async def test_the_template_shows_the_tools_unless_none_may_be_called(chat_door: ChatDoor, chat_tokenizer: Tokenizer):
    """tool_choice none hides the tools, and markers of calls are content then."""
    router = writes(chat_tokenizer, CALL)
    async with chat_door(router) as door:
        await door.post(PATH, messages=ASK, tools=TOOLS)
        answer = await door.post(PATH, messages=ASK, tools=TOOLS, tool_choice="none")
    shown, hidden = (chat_tokenizer.decode(request.prompt_ids, special=True) for request in router.requests)
    assert '"weather"' in shown
    assert '"weather"' not in hidden
    assert answer["choices"][0]["message"]["content"] == CALL
    assert answer["choices"][0]["finish_reason"] == "stop"


async def test_reasoning_is_split_off(chat_door: ChatDoor, chat_tokenizer: Tokenizer):
    """What stands between the markers of reasoning is reasoning_content."""
    router = writes(chat_tokenizer, "<think>\nA thought.\n</think>\n\nAn answer.")
    async with chat_door(router) as door:
        message = (await door.post(PATH, messages=ASK))["choices"][0]["message"]
        streamed = await joined(door, messages=ASK)
    assert (message["reasoning_content"], message["content"]) == ("A thought.", "An answer.")
    assert (streamed["reasoning_content"], streamed["content"]) == ("A thought.", "An answer.")


async def test_a_call_without_end_is_passed_on_as_far_as_it_goes(chat_door: ChatDoor, chat_tokenizer: Tokenizer):
    """An output that max_tokens cuts inside a call ends by length."""
    router = writes(chat_tokenizer, CALL)
    most = len(router.script) - 6
    async with chat_door(router) as door:
        answer = await door.post(PATH, messages=ASK, tools=TOOLS, max_tokens=most)
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_a_forced_call_is_a_guide_whose_outputs_are_calls(
    chat_door: ChatDoor, chat_tokenizer: Tokenizer, chat_folder: str
):
    """What follows the guide of tool_choice is a call of the named tool, or of any, with arguments that match its schema."""
    router = writes(chat_tokenizer, CALL)
    named = {"type": "function", "function": {"name": "weather"}}
    guides = Guides(chat_folder, router_vocabulary(), 1)
    try:
        async with chat_door(router) as door:
            for choice in ("required", named):
                await door.post(PATH, messages=ASK, tools=TOOLS, tool_choice=choice)
                request = router.requests[-1]
                for text in (CALL, *([CLOCK] if choice == "required" else [])):
                    assert await follows(guides, request, chat_tokenizer, text)
                wrong = CALL.replace("Rome", "Constantinople")
                assert not await follows(guides, request, chat_tokenizer, wrong)
                assert not await follows(guides, request, chat_tokenizer, "No call.")
                if choice is named:
                    assert not await follows(guides, request, chat_tokenizer, CLOCK)
    finally:
        guides.close()
    arguments = json.loads(CALL.split("\n")[1])["arguments"]
    jsonschema.validate(arguments, SCHEMA)


def router_vocabulary() -> int:
    """The size of the fake model's vocabulary."""
    return fake_shape().vocabulary


async def follows(guides: Guides, request: Any, tokenizer: Tokenizer, text: str) -> bool:
    """Whether a whole output of `text` follows the guide of an engine request."""
    from moiety.core.sampling import Guide, GuideKind

    guide = Guide(GuideKind.GRAMMAR, request.sampling.guide.grammar)
    matcher = (await guides.compile(guide, list(request.prompt_ids))).matcher()
    generated: list[int] = []
    for token in [*tokenizer.encode(text, begin=False), guides.eos_ids[0]]:
        allowed, failed = allowed_tokens([matcher], router_vocabulary())
        if failed or not allowed[0, token]:
            return False
        generated.append(token)
        matcher.follow(generated)
    return True


async def test_wrong_tools_are_refused_by_name(chat_door: ChatDoor, tokenizer: Tokenizer):
    """Unknown choices, functions without names, and tools for a checkpoint without a format."""
    nameless = [{"type": "function", "function": {}}]
    other = {"type": "function", "function": {"name": "other"}}
    engine = FakeEngine("a", fake_shape(max_context=2048))
    async with chat_door(engine) as door:
        assert (await door.refused(PATH, 400, messages=ASK, tools=TOOLS, tool_choice="some"))["param"] == "tool_choice"
        assert (await door.refused(PATH, 400, messages=ASK, tools=TOOLS, tool_choice=other))["param"] == "tool_choice"
        assert (await door.refused(PATH, 400, messages=ASK, tool_choice="required"))["param"] == "tool_choice"
        assert "tools" in (await door.refused(PATH, 400, messages=ASK, tools=nameless))["param"]
        guided = {"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}
        assert (await door.refused(PATH, 400, messages=ASK, **guided))["param"] == "response_format"
    async with door_over(tokenizer, FakeEngine("a", fake_shape(max_context=2048))) as door:
        error = await door.refused(PATH, 400, messages=ASK, tools=TOOLS)
    assert "not known" in error["message"]
