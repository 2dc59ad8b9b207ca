"""The synchronous client of the package openai."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from moiety.gateway.text.tokenizer import Tokenizer
from moiety.testing import FakeEngine, eventually
from support.doors import ChatDoor, door_over

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


async def test_models_completions_and_chat(chat_door: ChatDoor, router: FakeEngine, connect_sync: Any):
    """The client lists models and gets completions and chat, whole and as streams that join to the same."""

    def use(client: openai.OpenAI) -> None:
        (model,) = client.models.list().data
        assert client.models.retrieve(model.id).id == "fake"
        completion = client.completions.create(model=model.id, prompt="Once", max_tokens=5, seed=1)
        pieces = client.completions.create(model=model.id, prompt="Once", max_tokens=5, seed=1, stream=True)
        assert "".join(piece.choices[0].text for piece in pieces) == completion.choices[0].text
        assert completion.usage is not None
        assert completion.usage.completion_tokens == 5
        chat = client.chat.completions.create(model=model.id, messages=HELLO, max_tokens=5, seed=1)
        stream = client.chat.completions.create(model=model.id, messages=HELLO, max_tokens=5, seed=1, stream=True)
        joined = "".join(piece.choices[0].delta.content or "" for piece in stream)
        assert joined == chat.choices[0].message.content
        assert chat.choices[0].finish_reason == "length"

    async with chat_door(router) as door:
        with connect_sync(door) as client:
            await asyncio.to_thread(use, client)


async def test_errors_have_the_classes_that_programs_catch(chat_door: ChatDoor, router: FakeEngine, connect_sync: Any):
    """Wrong values, unknown models and a full system raise the client's own classes, with param and request id."""

    def use(client: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError) as wrong:
            client.chat.completions.create(model="fake", messages=HELLO, temperature=99)
        assert (wrong.value.param, wrong.value.type) == ("temperature", "invalid_request_error")
        assert wrong.value.request_id
        with pytest.raises(openai.NotFoundError) as unknown:
            client.chat.completions.create(model="other", messages=HELLO)
        assert unknown.value.code == "model_not_found"
        router.places = 0
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(model="fake", messages=HELLO)

    async with chat_door(router) as door:
        with connect_sync(door) as client:
            await asyncio.to_thread(use, client)


async def test_a_refused_request_is_tried_again(chat_door: ChatDoor, router: FakeEngine, connect_sync: Any):
    """The client waits as the answer says, and gets its completion once there is a place."""
    router.places = 0

    def use(client: openai.OpenAI) -> str:
        return client.completions.create(model="fake", prompt="Once", max_tokens=3).choices[0].finish_reason

    async with chat_door(router) as door:
        with connect_sync(door, max_retries=5) as client:
            asking = asyncio.create_task(asyncio.to_thread(use, client))
            await eventually(lambda: router.refused >= 2)
            router.places = 8
            assert await asking == "length"


async def test_without_a_router_the_client_sees_a_server_error(chat_tokenizer: Tokenizer, connect_sync: Any):
    """503 raises InternalServerError, which the client would try again."""

    def use(client: openai.OpenAI) -> None:
        with pytest.raises(openai.InternalServerError) as error:
            client.completions.create(model="fake", prompt="Once")
        assert error.value.status_code == 503

    async with door_over(chat_tokenizer, router_wait_s=0.1) as door:
        with connect_sync(door) as client:
            await asyncio.to_thread(use, client)
