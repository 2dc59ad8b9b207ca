"""Errors over HTTP: OpenAI's body, the right status, and the client's name of the field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from gateway_support import PROMPT, SHAPE

from moiety.errors import MoietyError, NoHolder, ResourceExhausted, Unavailable
from moiety.gateway.http.errors import problem_of
from moiety.gateway.text.tokenizer import Tokenizer
from moiety.testing import FakeEngine, eventually, fake_shape
from support.doors import ChatDoor, door_over

PATH, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]


def engine() -> FakeEngine:
    """A router."""
    return FakeEngine("a", SHAPE)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"prompt": 5}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": [[1], "a"]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [10**6]}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": "many"}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": 10**300}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"n": 0}, "n"),
    ({"n": 10**9}, "n"),
    ({"best_of": 3}, "best_of"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"5": "1"}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias[5]"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": 5}, "stop"),
    ({"stop_token_ids": [10**6]}, "stop_token_ids"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids"),
    ({"seed": 2**64}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"min_tokens": 99}, "min_tokens"),
    ({"priority": 101}, "priority"),
    ({"user": "a" * 129}, "user"),
    ({"user": 5}, "user"),
    ({"suffix": "a"}, "suffix"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 3}}, "stream_options.include_usage"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"guided_regex": 5}, "guided_regex"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"jsn": {"type": "object"}}}, "structured_outputs"),
    ({"stream_options": True}, "stream_options"),
    ({"guided_regex": "a" * (1 << 17)}, "guided_regex"),
    ({"add_special_tokens": False}, "add_special_tokens"),
]


async def test_a_wrong_field_is_named_and_an_unknown_one_ignored(tokenizer: Tokenizer):
    """Each is refused with 400 and named as the client named it; no router sees any of them."""
    router = engine()
    async with door_over(tokenizer, router) as door:
        for fields, name in WRONG:
            error = await door.refused(PATH, 400, **{"prompt": PROMPT, "max_tokens": 4, **fields})
            assert error["param"] == name, error
            assert error["type"] == "invalid_request_error"
            assert error["message"].startswith(f"{name} = ")
            assert "instance of" not in error["message"]  # the name of a class says nothing to a client
        assert not router.requests
        await door.post(PATH, prompt=PROMPT, max_tokens=2, service_tier="auto", metadata={"a": 1}, x=None, best_of=1)


async def test_chat_fields_are_named_as_the_client_named_them(chat_door: ChatDoor):
    """The length has two names, and both kinds of log probabilities have their own."""
    async with chat_door(FakeEngine("a", fake_shape(max_context=256))) as door:
        asked = {"messages": HELLO}
        for fields, name in [
            ({"max_tokens": 9999}, "max_tokens"),
            ({"max_completion_tokens": 9999, "max_tokens": 1}, "max_completion_tokens"),
            ({"top_logprobs": 2}, "top_logprobs"),
            ({"logprobs": 5}, "logprobs"),
            ({"messages": []}, "messages"),
            ({"messages": "hello"}, "messages"),
            ({"messages": [{"content": "a"}]}, "messages[0].role"),
            ({"functions": [{}]}, "functions"),
            ({"chat_template": "{{ 1 }}"}, "chat_template"),
            ({"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs.self"),
        ]:
            error = await door.refused(CHAT, 400, **{**asked, **fields})
            assert error["param"] == name, error
        for words in (200, 20_000):  # too many tokens, and so many characters that they are not tokenised
            too_long = await door.refused(CHAT, 400, messages=[{"role": "user", "content": "x y z " * words}])
            assert (too_long["code"], too_long["param"]) == ("context_length_exceeded", "messages")


async def test_models_paths_and_methods_have_their_statuses(tokenizer: Tokenizer):
    """404 for an unknown model or path, 405 with the right method for a wrong one."""
    async with door_over(tokenizer, engine()) as door:
        error = await door.refused(PATH, 404, prompt=PROMPT, model="other")
        assert error["code"] == "model_not_found"
        assert (await door.http.get("/v1/models/other")).status_code == 404
        assert (await door.http.get("/v2/models")).json()["error"]["code"] == "unknown_url"
        got = await door.http.get(PATH)
        assert (got.status_code, got.headers["allow"]) == (405, "POST")
        assert (await door.http.delete("/v1/models")).status_code == 405


async def test_bodies_that_are_no_json_object_are_refused(tokenizer: Tokenizer):
    """Broken JSON, NaN, depth and lists are 400; another type or encoding 415."""
    kind = {"content-type": "application/json"}
    bodies = [
        b"",
        b"{",
        b"[1]",
        b"null",
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": ' + b"[" * 100_000,
        b'{"a": ' + b"9" * 100_000 + b"}",
        b"\xff\xfe",
    ]
    async with door_over(tokenizer, engine()) as door:
        for body in bodies:
            answer = await door.http.post(PATH, content=body, headers=kind)
            assert answer.status_code == 400, body[:40]
            assert answer.json()["error"]["param"] == "body"
        for headers in ({"content-type": "text/plain"}, {}, {**kind, "content-encoding": "gzip"}):
            answer = await door.http.post(PATH, content=b'{"prompt": "a"}', headers=headers)
            assert answer.status_code == 415
        answer = await door.http.post(
            PATH,
            content=b'{"prompt": "a", "max_tokens": 1}',
            headers={"content-type": "application/json; charset=utf-8"},
        )
        assert answer.status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (rb'{"prompt": "caf\ud83d"}', "prompt"),
        (rb'{"prompt": "a", "stop": ["b", "\ud83d"]}', "stop[1]"),
        (rb'{"prompt": "a", "response_format": {"json_schema": {"\udc00": 1}}}', "response_format.json_schema"),
    ],
)
async def test_half_a_character_is_refused_by_its_field(body: bytes, param: str, tokenizer: Tokenizer):
    """JSON can hold half of a surrogate pair, which no text in UTF-8 can: the error says where it stands."""
    async with door_over(tokenizer, engine()) as door:
        answer = await door.http.post(PATH, content=body, headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert "one half of a surrogate pair" in error["message"]


async def test_a_body_is_bounded_before_it_is_parsed(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    """A body is refused by its declared length or while it arrives, and all bodies share a budget that comes back."""
    monkeypatch.setattr("moiety.gateway.http.body.MOST_BYTES", 100_000)
    kind = {"content-type": "application/json"}
    large = json.dumps({"prompt": PROMPT, "max_tokens": 1, "pad": "a" * 90_000}).encode()

    async def pieces(count: int):
        for _ in range(count):
            yield b"a" * 10_000

    async with door_over(tokenizer, engine()) as door:
        declared = await door.http.post(PATH, content=b"a" * 100_001, headers=kind)
        chunked = await door.http.post(PATH, content=pieces(20), headers=kind)
        assert (declared.status_code, chunked.status_code) == (413, 413)
        monkeypatch.setattr("moiety.gateway.http.body.MOST_BYTES_TOGETHER", 80_000)
        full = await door.http.post(PATH, content=large, headers=kind)
        assert full.status_code == 429
        assert "retry-after" in full.headers
        monkeypatch.setattr("moiety.gateway.http.body.MOST_BYTES_TOGETHER", 100_000)
        for _ in range(3):
            assert (await door.http.post(PATH, content=large, headers=kind)).status_code == 200


async def test_a_full_system_says_when_to_come_again(tokenizer: Tokenizer):
    """429 with Retry-After in whole seconds and retry-after-ms, for whole answers and streams."""
    router = FakeEngine("a", SHAPE, places=0)
    async with door_over(tokenizer, router) as door:
        for stream in (False, True):
            answer = await door.http.post(PATH, json={"prompt": PROMPT, "stream": stream})
            assert answer.status_code == 429
            assert int(answer.headers["retry-after"]) >= 1
            assert 0 < int(answer.headers["retry-after-ms"]) < 60_000
            assert answer.json()["error"]["type"] == "rate_limit_error"


async def test_without_a_router_the_answer_is_503(tokenizer: Tokenizer):
    """So is /readyz, at once, while /healthz stays 200; nor is a gateway ready that shuts down."""
    async with door_over(tokenizer, router_wait_s=0.5) as door:
        assert (await door.refused(PATH, 503, prompt=PROMPT))["type"] == "server_error"
        assert (await door.http.get("/readyz")).status_code == 503
        assert (await door.http.get("/healthz")).status_code == 200
        router = engine()
        await router.start(door.gateway.registry)
        try:
            await eventually(lambda: bool(door.gateway.watch.replicas))
            assert (await door.post(PATH, prompt=PROMPT, max_tokens=1))["usage"]["completion_tokens"] == 1
            assert (await door.http.get("/readyz")).status_code == 200
            door.gateway.core.refuse()
            assert (await door.http.get("/readyz")).status_code == 503
            assert (await door.refused(PATH, 503, prompt=PROMPT))["message"] == "the server is shutting down"
        finally:
            await router.vanish()


async def test_a_fault_shows_its_request_id_and_nothing_else(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    """An unexpected exception is 500 with the id to find it by; its text stays in the log."""
    monkeypatch.setattr("moiety.gateway.text.encoder.PromptEncoder.encode", lambda *_, **__: 1 / 0)
    async with door_over(tokenizer, engine()) as door:
        answer = await door.http.post(PATH, json={"prompt": "a"}, headers={"x-request-id": "mine"})
        assert answer.status_code == 500
        assert answer.headers["x-request-id"] == "mine"
        assert "mine" in answer.json()["error"]["message"]
        assert "division" not in answer.text


async def test_request_ids_and_trace_contexts_come_from_headers(tokenizer: Tokenizer):
    """A usable X-Request-Id goes to the router and back; another one is replaced."""
    router = engine()
    async with door_over(tokenizer, router) as door:
        body = {"prompt": PROMPT, "max_tokens": 1}
        kept = await door.http.post(PATH, json=body, headers={"x-request-id": "abc-1"})
        drawn = await door.http.post(PATH, json=body, headers={"x-request-id": "a" * 500})
    assert kept.headers["x-request-id"] == "abc-1"
    assert kept.json()["id"] == "cmpl-abc-1"
    assert router.requests[0].request_id == "abc-1"
    assert len(drawn.headers["x-request-id"]) == 16


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Unavailable("x"), 503),
        (NoHolder(1, [2], 3.0), 503),
        (ResourceExhausted("x", 0.2), 429),
        (MoietyError("x"), 500),
    ],
)
def test_every_class_of_errors_has_a_status(error: MoietyError, status: int):
    """The nearest class of the table decides."""
    assert problem_of(error).status == status


async def test_bodies_that_take_long_to_parse_are_refused(tokenizer: Tokenizer):
    """Millions of lists or numbers in one body are refused before they are parsed; as many in a text are not needed."""
    async with door_over(tokenizer, engine()) as door:
        for value in ("[],", "1,"):
            body = b'{"prompt": "a", "unknown": [' + value.encode() * (1 << 20) + b"1]}"
            answer = await door.http.post(PATH, content=body, headers={"content-type": "application/json"})
            assert answer.status_code == 413
            assert "the most allowed" in answer.json()["error"]["message"]
