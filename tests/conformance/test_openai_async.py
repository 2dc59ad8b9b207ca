"""The asynchronous client of the package openai."""

from __future__ import annotations

import asyncio
from typing import Any

from moiety.testing import FakeEngine, eventually
from support.doors import ChatDoor

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


async def test_choices_log_probabilities_and_usage(chat_door: ChatDoor, router: FakeEngine, connect: Any):
    """The typed answers hold all of them, and a stream ends with the usage."""
    asked: dict[str, Any] = {"model": "fake", "messages": HELLO, "max_completion_tokens": 4, "seed": 2, "n": 2}
    async with chat_door(router) as door, connect(door) as client:
        chat = await client.chat.completions.create(logprobs=True, top_logprobs=2, **asked)
        stream = await client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **asked)
        chunks = [chunk async for chunk in stream]
        legacy = await client.completions.create(
            model="fake", prompt=["One", "Two"], max_tokens=2, logprobs=1, echo=True
        )
    assert len(chat.choices) == 2
    assert all(len(choice.logprobs.content) == 4 for choice in chat.choices)
    assert bytes(chat.choices[0].logprobs.content[0].bytes)
    assert len(chat.choices[0].logprobs.content[0].top_logprobs) == 2
    assert chat.usage.prompt_tokens_details.cached_tokens == 0
    assert chunks[-1].usage.completion_tokens == chat.usage.completion_tokens == 8
    assert chunks[-1].choices == []
    assert [choice.text[:3] for choice in legacy.choices] == ["One", "Two"]
    assert legacy.choices[1].logprobs.token_logprobs[0] is None


async def test_fields_of_vllm_pass_as_extra_body(chat_door: ChatDoor, router: FakeEngine, connect: Any):
    """extra_body carries what OpenAI's API lacks, and further answers are attributes."""
    extra = {"top_k": 5, "min_p": 0.25, "return_token_ids": True, "chat_template_kwargs": {"enable_thinking": False}}
    async with chat_door(router) as door, connect(door) as client:
        chat = await client.chat.completions.create(model="fake", messages=HELLO, max_tokens=3, extra_body=extra)
    assert (router.requests[0].sampling.top_k, router.requests[0].sampling.min_p) == (5, 0.25)
    assert len(chat.choices[0].token_ids) == 3
    assert chat.prompt_token_ids == list(router.requests[0].prompt_ids)


async def test_many_requests_at_once(chat_door: ChatDoor, router: FakeEngine, connect: Any):
    """Sixteen streams of one client run together, each with its own output."""

    async def text(client: Any, seed: int) -> str:
        stream = await client.chat.completions.create(
            model="fake", messages=HELLO, max_tokens=8, seed=seed, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async with chat_door(router) as door, connect(door) as client:
        together = await asyncio.gather(*(text(client, seed) for seed in range(16)))
        alone = [await text(client, seed) for seed in range(16)]
    assert together == alone
    assert len(set(together)) > 1


async def test_closing_a_stream_cancels_it(chat_door: ChatDoor, router: FakeEngine, connect: Any):
    """The router stops as soon as the client closes the stream."""

    async def hold(position: int) -> None:
        if position == 2:
            await asyncio.Event().wait()

    router.before_token = hold
    async with chat_door(router) as door, connect(door) as client:
        stream = await client.chat.completions.create(model="fake", messages=HELLO, max_tokens=8, stream=True)
        async for _ in stream:
            break
        await stream.close()
        await eventually(lambda: router.cancelled == 1)
