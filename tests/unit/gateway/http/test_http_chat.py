"""POST /v1/chat/completions without tools: the template, defaults, log probabilities, guides, streams."""

from __future__ import annotations

import json
from typing import Any

from gateway_support import SHAPE

from moiety.core.sampling import Guide, GuideKind
from moiety.gateway.text.tokenizer import Tokenizer
from moiety.model.checkpoint.generation_defaults import GenerationDefaults
from moiety.router.sequence.guides import Guides
from moiety.testing import FakeEngine, fake_shape
from support.doors import ChatDoor, door_over

PATH = "/v1/chat/completions"
WIDE = fake_shape(max_context=512)
ASK: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


def engine() -> FakeEngine:
    """A router whose context takes a conversation."""
    return FakeEngine("a", WIDE)


async def test_messages_become_the_prompt_that_the_template_writes(chat_door: ChatDoor, chat_tokenizer: Tokenizer):
    """The router gets the rendered conversation, whose special tokens come from the template alone."""
    router = engine()
    async with chat_door(router) as door:
        answer = await door.post(PATH, messages=ASK, max_tokens=4, seed=0, return_token_ids=True)
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    ids = chat_tokenizer.encode(text, begin=False)
    assert list(router.requests[0].prompt_ids) == ids
    assert answer["prompt_token_ids"] == ids
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert len(choice["token_ids"]) == 4
    assert choice["finish_reason"] == "length"
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")


async def test_template_arguments_and_continued_messages_reach_the_template(
    chat_door: ChatDoor, chat_tokenizer: Tokenizer
):
    """chat_template_kwargs are variables, and continue_final_message leaves the last message open."""
    router = engine()
    thought = [*ASK, {"role": "assistant", "content": "I say"}]
    async with chat_door(router) as door:
        await door.post(PATH, messages=ASK, max_tokens=1, chat_template_kwargs={"enable_thinking": False})
        await door.post(PATH, messages=thought, max_tokens=1, continue_final_message=True)
        error = await door.refused(PATH, 400, messages=thought, continue_final_message=True, add_generation_prompt=True)
    first, second = (chat_tokenizer.decode(request.prompt_ids, special=True) for request in router.requests)
    assert first.endswith("<think>\n\n</think>\n\n")
    assert second.endswith("<|im_start|>assistant\nI say")
    assert error["param"] == "continue_final_message"


async def test_an_answer_fills_the_context_by_default(chat_door: ChatDoor):
    """Without a length the output has all that the context has left, at temperature 1."""
    router = engine()
    async with chat_door(router) as door:
        answer = await door.post(PATH, messages=ASK)
    assert answer["usage"]["total_tokens"] == WIDE.max_context
    assert router.requests[0].sampling.temperature == 1.0


async def test_the_checkpoints_defaults_stand_where_a_request_says_nothing(chat_door: ChatDoor):
    """generation_config.json's values apply, and those of a request win."""
    router = engine()
    defaults = GenerationDefaults(temperature=0.5, top_p=0.75, top_k=20, repetition_penalty=1.25, max_new_tokens=5)
    async with chat_door(router, defaults=defaults) as door:
        await door.post(PATH, messages=ASK)
        await door.post(PATH, messages=ASK, temperature=0, top_p=1, top_k=-1, repetition_penalty=1, max_tokens=3)
    first, second = (request.sampling for request in router.requests)
    seen = (first.temperature, first.top_p, first.top_k, first.repetition_penalty, first.max_tokens)
    assert seen == (0.5, 0.75, 20, 1.25, 5)
    assert (second.temperature, second.top_p, second.top_k, second.repetition_penalty) == (0.0, 1.0, 0, 1.0)
    assert second.max_tokens == 3


async def test_a_default_length_beyond_the_context_is_cut(chat_door: ChatDoor):
    """A checkpoint that recommends more tokens than the context has left gives what is left."""
    async with chat_door(engine(), defaults=GenerationDefaults(max_new_tokens=9999)) as door:
        answer = await door.post(PATH, messages=ASK)
    assert answer["usage"]["total_tokens"] == WIDE.max_context


async def test_log_probabilities_come_with_bytes(chat_door: ChatDoor):
    """Each token has its text, its bytes and the likeliest others; the bytes make up the text."""
    asked = {"messages": ASK, "max_tokens": 5, "seed": 3, "logprobs": True, "top_logprobs": 2}
    async with chat_door(engine()) as door:
        answer = await door.post(PATH, **asked)
        events = await door.events(PATH, **asked)
    entries = answer["choices"][0]["logprobs"]["content"]
    assert len(entries) == 5
    assert all(len(entry["top_logprobs"]) == 2 for entry in entries)
    assert all(set(entry["top_logprobs"][0]) == {"token", "logprob", "bytes"} for entry in entries)
    streamed = [entry for event in events for entry in event["choices"][0]["logprobs"]["content"]]
    assert streamed == entries


async def test_the_first_chunk_of_every_choice_has_the_role(chat_door: ChatDoor):
    """The chunks of each choice begin with the role, end with a reason, and join to the whole answer."""
    asked = {"messages": ASK, "max_tokens": 6, "seed": 1, "n": 2}
    async with chat_door(engine()) as door:
        whole = await door.post(PATH, **asked)
        events = await door.events(PATH, stream_options={"include_usage": True}, **asked)
    assert events.pop()["usage"] == whole["usage"]
    for index, choice in enumerate(whole["choices"]):
        parts = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert [part["delta"].get("role") for part in parts] == ["assistant"] + [None] * (len(parts) - 1)
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["length"]
        assert "".join(part["delta"].get("content", "") for part in parts) == choice["message"]["content"]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}


async def test_guides_of_every_spelling_reach_the_router(chat_door: ChatDoor):
    """response_format, structured_outputs and guided_* become the router's guide; two of them are refused."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    named = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    spelled: list[tuple[dict[str, Any], str, str]] = [
        ({"response_format": {"type": "json_object"}}, "json_schema", '{"type":"object"}'),
        ({"response_format": named}, "json_schema", json.dumps(schema, separators=(",", ":"))),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
        ({"structured_outputs": {"json": schema}}, "json_schema", json.dumps(schema, separators=(",", ":"))),
        ({"structured_outputs": {"json_object": True}}, "json_schema", '{"type":"object"}'),
        ({"guided_grammar": 'start: "a"'}, "grammar", 'start: "a"'),
        ({"guided_choice": ["yes", 'n"o']}, "grammar", 'start: "yes" | "n\\"o"'),
        ({"guided_json": json.dumps(schema)}, "json_schema", json.dumps(schema)),
        ({"guided_regex": "[a-c]"}, "regex", "[a-c]"),
    ]
    router = engine()
    async with chat_door(router) as door:
        for fields, _, _ in spelled:
            await door.post(PATH, messages=ASK, max_tokens=2, **fields)
        await door.post(PATH, messages=ASK, max_tokens=2, response_format={"type": "text"})
        both = await door.refused(PATH, 400, messages=ASK, guided_regex="a", response_format={"type": "json_object"})
        wrong = await door.refused(PATH, 400, messages=ASK, response_format={"type": "xml"})
    for (_, kind, text), request in zip(spelled, router.requests, strict=False):
        assert getattr(request.sampling.guide, kind) == text
    assert not router.requests[-1].sampling.HasField("guide")
    assert both["param"] == "guided_regex"
    assert wrong["param"] == "response_format.type"


async def test_the_grammar_of_a_choice_compiles(chat_door: ChatDoor, chat_folder: str):
    """Quotes, backslashes, line breaks and other languages in the texts of guided_choice make a grammar that routers take."""
    router = engine()
    async with chat_door(router) as door:
        await door.post(PATH, messages=ASK, max_tokens=2, guided_choice=["yes", 'n"o', "a\\b", "c\nd", "é漢", "[x]*/"])
    guides = Guides(chat_folder, WIDE.vocabulary, 1)
    try:
        await guides.compile(Guide(GuideKind.GRAMMAR, router.requests[0].sampling.guide.grammar), [5])
    finally:
        guides.close()


async def test_a_checkpoint_without_a_template_takes_no_messages(tokenizer: Tokenizer):
    """The error says so and names the field."""
    async with door_over(tokenizer, FakeEngine("a", SHAPE)) as door:
        error = await door.refused(PATH, 400, messages=ASK)
    assert error["param"] == "messages"
    assert "no chat template" in error["message"]


async def test_what_the_template_refuses_is_an_error_of_the_client(chat_door: ChatDoor):
    """An unknown role and a picture are refused by name."""
    picture = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}
    async with chat_door(engine()) as door:
        role = await door.refused(PATH, 400, messages=[{"role": "king", "content": "a"}])
        image = await door.refused(PATH, 400, messages=[picture])
        parts = await door.post(
            PATH, messages=[{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], max_tokens=1
        )
    assert role["param"].startswith("messages")
    assert image["param"].startswith("messages")
    assert parts["usage"]["completion_tokens"] == 1
