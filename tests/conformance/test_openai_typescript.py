"""The official openai package for JavaScript, from TypeScript, against a gateway over a fake router."""

from __future__ import annotations

import asyncio

import pytest
from conformance_support import Program, typescript

from moiety.gateway.text.tokenizer import Tokenizer
from moiety.testing import FakeEngine, eventually
from support.doors import ChatDoor, Door

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


@pytest.fixture
def program() -> Program:
    """The client program."""
    return typescript("http.js")


def address(door: Door) -> str:
    """The HTTP door's host and port."""
    return door.url.removeprefix("http://")


async def test_chat_and_its_stream(chat_door: ChatDoor, router: FakeEngine, program: Program):
    """The client lists models, and a stream joins to the whole answer and ends with the usage."""
    async with chat_door(router) as door:
        seen = await program.run("stream", address(door))
    assert seen.pop("text")
    assert seen == {"models": ["fake"], "same": True, "reason": "length", "tokens": 8}


async def test_streamed_tool_calls(
    chat_door: ChatDoor, chat_tokenizer: Tokenizer, router: FakeEngine, program: Program
):
    """The client's own stream helper puts a call together."""
    router.script = [*chat_tokenizer.encode(CALL, begin=False), chat_tokenizer.vocabulary["<|im_end|>"]]
    async with chat_door(router) as door:
        seen = await program.run("tool", address(door))
    assert seen == {"reason": "tool_calls", "calls": [["weather", {"city": "Rome"}]]}


async def test_errors_have_their_classes(chat_door: ChatDoor, router: FakeEngine, program: Program):
    """A wrong value, an unknown model and a full system raise the client's classes, with status, param, code and delay."""
    async with chat_door(router) as door:
        wrong = await program.run("wrong", address(door))
        unknown = await program.run("unknown", address(door))
        router.places = 0
        refused = await program.run("refused", address(door))
    assert (wrong["name"], wrong["status"], wrong["param"]) == ("BadRequestError", 400, "temperature")
    assert (unknown["name"], unknown["status"], unknown["code"]) == ("NotFoundError", 404, "model_not_found")
    assert (refused["name"], refused["status"]) == ("RateLimitError", 429)
    assert int(refused["retry"]) > 0


async def test_a_refused_request_is_tried_again(chat_door: ChatDoor, router: FakeEngine, program: Program):
    """The client waits as the answer says, and gets its completion once there is a place."""
    router.places = 0
    async with chat_door(router) as door:
        asking = asyncio.create_task(program.run("patient", address(door)))
        await eventually(lambda: router.refused >= 2)
        router.places = 8
        assert await asking == {"reason": "length"}


async def test_aborting_a_stream_cancels_it(chat_door: ChatDoor, router: FakeEngine, program: Program):
    """The router stops as soon as the client aborts its stream."""

    async def hold(position: int) -> None:
        if position == 2:
            await asyncio.Event().wait()

    router.before_token = hold
    async with chat_door(router) as door:
        assert (await program.run("cancel", address(door)))["seen"] >= 1
        await eventually(lambda: router.cancelled == 1)
