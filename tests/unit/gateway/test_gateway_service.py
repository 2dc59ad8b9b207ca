"""moiety.v1.GenerationService over loopback: the responses to good requests, and the error of each bad one."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from gateway_support import PROMPT, SHAPE, Gateway, chunks, expected, gateway_over, tokens

from moiety.core.sampling import FinishReason
from moiety.errors import DeadlineExceeded, InvalidRequest, ResourceExhausted, Unavailable
from moiety.gateway.text.tokenizer import Tokenizer
from moiety.testing import SYSTEM, FakeEngine, eventually
from moiety.v1 import generation_pb2
from moiety.wire.channels import channel
from moiety.wire.sampling_params import MAX_REQUEST_ID
from moiety.wire.service_names import GENERATION_SERVICE

NAN = float("nan")


def engine(name: str = "r0") -> FakeEngine:
    """A ready router."""
    return FakeEngine(name, SHAPE)


async def test_a_request_streams_tokens_text_and_usage(tokenizer: Tokenizer):
    """Each token is streamed; the first message has the request id, the last the finish reason and the counts."""
    async with gateway_over(tokenizer, engine()) as gateway:
        got = await chunks(gateway, max_tokens=6, request_id="mine")
        assert [token for chunk in got for token in chunk.token_ids] == expected(6)
        assert "".join(chunk.text for chunk in got) == tokenizer.decode(expected(6))
        assert [chunk.request_id for chunk in got] == ["mine"] + [""] * 5
        assert [chunk.finish_reason for chunk in got] == [None] * 5 + [FinishReason.LENGTH]
        assert (got[-1].prompt_tokens, got[-1].completion_tokens) == (3, 6)


async def test_text_and_its_ids_are_the_same_prompt(tokenizer: Tokenizer):
    """Text and its token ids give the same tokens; without a client's seed the engine still gets one, drawn per request."""
    router = engine()
    async with gateway_over(tokenizer, router) as gateway:
        ids = tokenizer.encode("hello")
        by_text = await chunks(gateway, "hello", max_tokens=4)
        by_ids = await chunks(gateway, ids, max_tokens=4)
        assert [chunk.token_ids for chunk in by_text] == [chunk.token_ids for chunk in by_ids]
        await chunks(gateway, "hello", max_tokens=1, seed=None)
        await chunks(gateway, "hello", max_tokens=1, seed=None)
        assert router.requests[-1].sampling.seed != router.requests[-2].sampling.seed
        assert tuple(router.requests[-1].stop_ids) == tokenizer.stop_ids


async def test_models_are_listed(tokenizer: Tokenizer):
    """ListModels returns name, revision and context of the served model."""
    async with gateway_over(tokenizer, engine()) as gateway:
        (model,) = await gateway.client.models()
        assert (model.name, model.revision, model.max_context) == ("fake", SYSTEM.revision, SHAPE.max_context)


async def test_an_encoder_s_prompt_leaves_the_output_its_context(tokenizer: Tokenizer):
    """An encoder's prompt takes none of the decoder's context of 64: an output of 63 tokens fits, of 64 does not."""
    async with gateway_over(tokenizer, FakeEngine("r0", SHAPE, encoder_decoder=True)) as gateway:
        assert sum([len(chunk.token_ids) for chunk in await chunks(gateway, [5] * 60, max_tokens=63)]) == 63
        with pytest.raises(InvalidRequest, match=r"sampling\.max_tokens = 64: must be 1 to 63"):
            await chunks(gateway, [5] * 60, max_tokens=64)
        with pytest.raises(InvalidRequest, match="prompt = '64 tokens': must be below the context of 64"):
            await chunks(gateway, [5] * 64, max_tokens=1)


async def test_a_first_token_is_named_by_text_or_id(tokenizer: Tokenizer):
    """The router receives the id of the first token, whether the client names its text or its id."""
    router = engine()
    async with gateway_over(tokenizer, router) as gateway:
        await chunks(gateway, max_tokens=1, first_token="<|pad|>")
        await chunks(gateway, max_tokens=1, first_token=2)
        assert [request.sampling.first_token_id for request in router.requests] == [2, 2]


INVALID, MISSING = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
BAD: dict[str, tuple[dict[str, Any], grpc.StatusCode, list[str]]] = {
    "no prompt": ({"token_ids": None}, INVALID, ["prompt", "text, token_ids or chat"]),
    "empty text": ({"text": ""}, INVALID, ["prompt.text", "at least one character"]),
    "no ids": ({"token_ids": []}, INVALID, ["prompt", "at least one token"]),
    "id beyond the vocabulary": ({"token_ids": [1, 320]}, INVALID, ["prompt.token_ids = 320", "below", "320"]),
    "prompt as long as the context": ({"token_ids": [1] * 64}, INVALID, ["prompt = '64 tokens'", "context of 64"]),
    "prompt + max_tokens": ({"max_tokens": 62}, INVALID, ["sampling.max_tokens = 62", "1 to 61", "context of 64"]),
    "no tokens": ({"max_tokens": 0}, INVALID, ["sampling.max_tokens = 0", "1 to 61"]),
    "absurd max_tokens": ({"max_tokens": 2**32 - 1}, INVALID, ["sampling.max_tokens = 4294967295"]),
    "negative temperature": ({"temperature": -0.1}, INVALID, ["sampling.temperature", "0 (greedy) to 10"]),
    "absurd temperature": ({"temperature": 1e9}, INVALID, ["sampling.temperature", "0 (greedy) to 10"]),
    "NaN temperature": ({"temperature": NAN}, INVALID, ["sampling.temperature = nan"]),
    "infinite temperature": ({"temperature": float("inf")}, INVALID, ["sampling.temperature = inf"]),
    "top_p of zero": ({"top_p": 0.0}, INVALID, ["sampling.top_p = 0.0", "above 0, up to 1"]),
    "top_p above one": ({"top_p": 1.5}, INVALID, ["sampling.top_p = 1.5"]),
    "NaN top_p": ({"top_p": NAN}, INVALID, ["sampling.top_p = nan"]),
    "negative top_k": ({"top_k": -1}, INVALID, ["sampling.top_k = -1", "vocabulary of 320"]),
    "top_k beyond the vocabulary": ({"top_k": 321}, INVALID, ["sampling.top_k = 321"]),
    "NaN min_p": ({"min_p": NAN}, INVALID, ["sampling.min_p = nan", "0 to 1"]),
    "no repetition penalty": (
        {"repetition_penalty": 0.0},
        INVALID,
        ["sampling.repetition_penalty", "above 0, up to 10"],
    ),
    "absurd presence penalty": ({"presence_penalty": 2.5}, INVALID, ["sampling.presence_penalty = 2.5", "-2 to 2"]),
    "absurd frequency penalty": ({"frequency_penalty": -3}, INVALID, ["sampling.frequency_penalty = -3", "-2 to 2"]),
    "bias of no token": ({"logit_bias": {320: 1.0}}, INVALID, ["sampling.logit_bias = 320", "vocabulary of 320"]),
    "absurd bias": ({"logit_bias": {7: 101.0}}, INVALID, ["sampling.logit_bias[7] = 101.0", "-100 to 100"]),
    "NaN bias": ({"logit_bias": {7: NAN}}, INVALID, ["sampling.logit_bias[7] = nan"]),
    "too many biases": ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, INVALID, ["1025 entries", "at most 1024"]),
    "top_logprobs without logprobs": ({"top_logprobs": 2}, INVALID, ["sampling.top_logprobs = 2", "without logprobs"]),
    "too many top_logprobs": (
        {"top_logprobs": 21, "logprobs": True},
        INVALID,
        ["sampling.top_logprobs = 21", "0 to 20"],
    ),
    "too many stop strings": ({"stop": ["x"] * 17}, INVALID, ["sampling.stop = '17 strings'", "at most 16"]),
    "empty stop string": ({"stop": [""]}, INVALID, ["sampling.stop = ''", "1 to 256 characters"]),
    "huge stop string": ({"stop": ["x" * 10**6]}, INVALID, ["sampling.stop = 'xxx", "1 to 256 characters"]),
    "too many stop ids": ({"stop_token_ids": [1] * 65}, INVALID, ["sampling.stop_token_ids = '65 ids'", "at most 64"]),
    "stop id of no token": ({"stop_token_ids": [999]}, INVALID, ["sampling.stop_token_ids = 999", "vocabulary of 320"]),
    "min_tokens above max_tokens": ({"min_tokens": 3}, INVALID, ["sampling.min_tokens = 3", "0 to max_tokens, 2"]),
    "a first token of no id": (
        {"first_token_id": 320},
        INVALID,
        ["sampling.first_token_id = 320", "vocabulary of 320"],
    ),
    "a first token of no text": ({"first_token": "xyz_Latn"}, INVALID, ["sampling.first_token = 'xyz_Latn'"]),
    "no choices": ({"n": 0}, INVALID, ["sampling.n = 0", "1 to 16"]),
    "too many choices": ({"n": 17}, INVALID, ["sampling.n = 17", "1 to 16"]),
    "a guide of no kind": ({"guide": {}}, INVALID, ["sampling.guide", "json_schema, regex, grammar"]),
    "empty guide": ({"guide": {"regex": ""}}, INVALID, ["sampling.guide.regex = ''", "1 to 65536 characters"]),
    "huge guide": ({"guide": {"grammar": "x" * 70_000}}, INVALID, ["sampling.guide.grammar", "1 to 65536 characters"]),
    "a guide without an end": ({"guide": {"regex": "a"}, "ignore_eos": True}, INVALID, ["sampling.ignore_eos = true"]),
    "absurd priority": ({"priority": 101}, INVALID, ["priority = 101", "-100 to 100"]),
    "huge tenant": ({"tenant": "x" * 129}, INVALID, ["tenant", "at most 128 characters"]),
    "unknown model": ({"model": "gpt-9"}, MISSING, ["'gpt-9'", "'fake'"]),
    "huge request id": ({"request_id": "x" * 10**6}, INVALID, ["request_id", f"at most {MAX_REQUEST_ID}"]),
}


def bad_request(changes: dict[str, Any]) -> bytes:
    """Returns a good request with `changes`, serialised."""
    fields = generation_pb2.SamplingParams.DESCRIPTOR.fields_by_name
    sampling = {key: value for key, value in changes.items() if key in fields}
    request = generation_pb2.GenerateRequest(
        **{key: changes[key] for key in ("model", "request_id", "priority", "tenant") if key in changes},
        sampling=generation_pb2.SamplingParams(**{"max_tokens": 2, **sampling}),
    )
    if "text" in changes:
        request.text = changes["text"]
    elif (ids := changes.get("token_ids", PROMPT)) is not None:
        request.token_ids.SetInParent()
        request.token_ids.ids.extend(ids)
    return request.SerializeToString()


async def refusal(gateway: Gateway, data: bytes) -> grpc.aio.AioRpcError:
    """Sends a request of these bytes; returns the error that it gets."""
    async with channel(gateway.address) as link:
        call = link.unary_stream(f"/{GENERATION_SERVICE}/Generate")(data)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call.read()
    return refused.value


async def test_bad_requests_get_field_value_and_bound(tokenizer: Tokenizer):
    """Each bad request gets its status and an error that names field, value and bound; the next request is served."""
    async with gateway_over(tokenizer, engine()) as gateway:
        for name, (changes, code, words) in BAD.items():
            error = await refusal(gateway, bad_request(changes))
            assert error.code() is code, name
            assert all(word in error.details() for word in words), f"{name}: {error.details()}"
            assert len(error.details()) < 300, name
            assert await tokens(gateway, 2) == expected(2), f"after {name}"


async def test_a_huge_prompt_is_refused_for_its_length(tokenizer: Tokenizer):
    """A text or token ids that cannot fit into the context are refused before they are converted."""
    async with gateway_over(tokenizer, engine()) as gateway:
        error = await refusal(gateway, bad_request({"text": "expert " * 150_000}))
        assert "prompt.text = '1050000 characters'" in error.details()
        assert "a context of 64 tokens" in error.details()
        error = await refusal(gateway, bad_request({"token_ids": [1] * 1_000_000}))
        assert "prompt = '1000000 tokens': must be below the context of 64 tokens" in error.details()


@pytest.mark.parametrize("data", [b"\x12\x02\xff\xfe", b"\x0a\x01\x80", b"\xff" * 20], ids=["text", "model", "garbage"])
async def test_bytes_that_are_no_request_are_invalid(tokenizer: Tokenizer, data: bytes):
    """Bytes that are no GenerateRequest, or hold invalid UTF-8, get INVALID_ARGUMENT, not INTERNAL."""
    async with gateway_over(tokenizer, engine()) as gateway:
        error = await refusal(gateway, data)
        assert error.code() is INVALID
        assert error.details().startswith("request = 'unreadable bytes': must be a message with valid UTF-8 text")
        assert await tokens(gateway, 2) == expected(2)


async def test_without_a_router_requests_wait_and_then_fail(tokenizer: Tokenizer):
    """Without a router a request gets UNAVAILABLE after router_wait_s, which it names; a router in time is used."""
    async with gateway_over(tokenizer, router_wait_s=0.2) as gateway:
        with pytest.raises(Unavailable, match=r"no router is ready; waited 0.2 s \(setting router_wait_s\)"):
            await tokens(gateway)
    async with gateway_over(tokenizer) as gateway:
        waiting = asyncio.create_task(tokens(gateway))
        await eventually(lambda: gateway.core.running == 1)
        router = engine()
        await router.start(gateway.registry)
        try:
            assert await waiting == expected(6)
        finally:
            await router.vanish()


async def test_a_deadline_holds_while_waiting_for_a_router(tokenizer: Tokenizer):
    """A client's deadline ends the wait for a router, in the client and in the gateway."""
    async with gateway_over(tokenizer, router_wait_s=60.0) as gateway:
        with pytest.raises(DeadlineExceeded):
            await tokens(gateway, timeout_s=0.1)
        await eventually(lambda: gateway.core.running == 0)


async def test_too_many_requests_are_refused_with_a_retry_delay(tokenizer: Tokenizer):
    """Beyond max_concurrent a request is refused at once with a retry delay; a freed place is used."""
    router, released = engine(), asyncio.Event()

    async def hold(_position: int) -> None:
        await released.wait()

    async with gateway_over(tokenizer, router, max_concurrent=2) as gateway:
        router.before_token = hold
        running = [asyncio.create_task(tokens(gateway)) for _ in range(2)]
        await eventually(lambda: len(router.requests) == 2)
        with pytest.raises(ResourceExhausted, match="2 requests are in flight") as refused:
            await tokens(gateway)
        assert refused.value.retry_after_s == 1.0
        released.set()
        assert [await task for task in running] == [expected(6)] * 2
        assert await tokens(gateway) == expected(6)


async def test_a_client_that_leaves_frees_its_router(tokenizer: Tokenizer):
    """Closing the stream cancels the request at its router while it waits for a token."""
    router = engine()

    async def hold(position: int) -> None:
        if position == 2:
            await asyncio.Event().wait()

    async with gateway_over(tokenizer, router) as gateway:
        router.before_token = hold
        stream = gateway.client.generate(PROMPT, max_tokens=6, seed=0)
        assert [(await anext(stream)).token_ids for _ in range(2)] == [(token,) for token in expected(2)]
        await stream.aclose()
        await eventually(lambda: router.cancelled == 1 and gateway.core.running == 0)
