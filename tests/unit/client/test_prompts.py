"""What a client can ask with: texts, token ids and messages; what comes back besides text."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator
from pathlib import Path
from typing import get_type_hints

import pytest

from moiety.client import Client, GenerateOptions, SyncClient, completion_of
from moiety.errors import InvalidRequest
from moiety.gateway.text.tokenizer import Tokenizer
from moiety.model.checkpoint.generation_defaults import GenerationDefaults
from moiety.synthetic.tokenizer import write_chat_tokenizer
from moiety.testing import FakeEngine, fake_shape
from support.gateways import Gateway, gateway_over

SHAPE = fake_shape(max_context=200)
MESSAGES = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hello"}]


@pytest.fixture
async def engine() -> FakeEngine:
    """The router behind `gateway`."""
    return FakeEngine("a", SHAPE)


@pytest.fixture
async def gateway(engine: FakeEngine, tmp_path: Path) -> AsyncIterator[Gateway]:
    """A gateway of a chat model whose publisher recommends top_k 7."""
    write_chat_tokenizer(tmp_path)
    tokenizer = Tokenizer(str(tmp_path))
    template = tokenizer.chat_template()
    assert template is not None
    try:
        async with gateway_over(
            tokenizer, engine, template=template, defaults=GenerationDefaults(top_k=7, temperature=0.5)
        ) as opened:
            yield opened
    finally:
        template.close()


async def test_messages_are_rendered(gateway: Gateway, engine: FakeEngine):
    """The template of the checkpoint, with its arguments, makes the prompt that a router gets."""
    arguments = {"enable_thinking": False}
    chunks = [c async for c in gateway.client.generate(MESSAGES, template_arguments=arguments, max_tokens=3)]
    tokenizer = gateway.core.model.tokenizer
    assert tokenizer.decode(list(engine.requests[0].prompt_ids), special=True) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    whole = completion_of(chunks)
    assert (whole.prompt_tokens, whole.completion_tokens) == (len(engine.requests[0].prompt_ids), 3)


async def test_recommended_defaults(gateway: Gateway, engine: FakeEngine):
    """`recommended` fills in what the publisher recommends and the whole context; what is given counts first."""
    engine.script = [5, 6]
    async for _ in gateway.client.generate(MESSAGES, recommended=True, top_k=3):
        pass
    async for _ in gateway.client.generate(MESSAGES):
        pass
    (chosen, usual) = (request.sampling for request in engine.requests)
    prompt_tokens = len(engine.requests[0].prompt_ids)
    assert (chosen.temperature, chosen.top_k, chosen.max_tokens) == (0.5, 3, SHAPE.max_context - prompt_tokens)
    assert (usual.temperature, usual.top_k, usual.max_tokens) == (0.0, 0, 128)


async def test_what_comes_back(gateway: Gateway, engine: FakeEngine):
    """The stop that matched, times, and the likeliest tokens of prompt positions are part of the chunks."""
    engine.script = gateway.core.model.tokenizer.encode("one two three", begin=False)
    options = {"logprobs": True, "top_logprobs": 2, "prompt_logprobs": True, "stop": ["two"]}
    chunks = [chunk async for chunk in gateway.client.generate("Each expert", **options)]
    assert (chunks[-1].matched_stop, chunks[0].matched_stop) == ("two", None)
    assert chunks[-1].timings is not None
    assert min(chunks[-1].timings.queued_s, chunks[-1].timings.prefill_s, chunks[-1].timings.decode_s) >= 0
    whole = completion_of(chunks)
    assert (whole.text, whole.choices[0].matched_stop) == ("one ", "two")
    assert [len(top.token_ids) for top in whole.prompt_top_logprobs] == [2] * (whole.prompt_tokens - 1)
    last_token = engine.script[-1]
    chunks = [chunk async for chunk in gateway.client.generate([5], stop_token_ids=[last_token])]
    assert chunks[-1].matched_stop == last_token


@pytest.mark.parametrize(
    ("prompt", "options", "field"),
    [
        ([{"role": "user"}], {}, "messages[0]"),
        ([{"role": "user", "content": "a", "name": "b"}], {}, "messages[0]"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": 3}], {}, "messages[1].content"),
        ([{"role": "user", "content": "a"}, "b"], {}, "messages[1]"),
        ([5, -1], {}, "prompt.token_ids"),
        (["a", "b"], {}, "prompt.token_ids"),
        ("a", {"template_arguments": {"x": 1}}, "template_arguments"),
        (MESSAGES, {"template_arguments": {"x": object()}}, "template_arguments"),
        ("a", {"regex": "a", "grammar": "b"}, "sampling.guide"),
    ],
)
def test_what_no_request_can_express(prompt: object, options: dict[str, object], field: str):
    """A wrong prompt or option is refused by name when `generate` is called."""
    with SyncClient("127.0.0.1:1") as client:
        with pytest.raises(InvalidRequest) as refused:
            client.generate(prompt, **options)  # type: ignore[arg-type]
        assert refused.value.field == field


def test_an_option_that_does_not_exist():
    """An unknown option is a TypeError, as for any function; all options are documented in one place."""
    with SyncClient("127.0.0.1:1") as client, pytest.raises(TypeError, match="no option colour"):
        client.generate("a", colour=3)  # type: ignore[call-arg]
    assert inspect.signature(Client.generate) == inspect.signature(SyncClient.generate)
    assert {"max_tokens", "timeout_s", "retries", "recommended"} < get_type_hints(GenerateOptions).keys()
