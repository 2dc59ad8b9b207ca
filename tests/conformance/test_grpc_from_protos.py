"""gRPC clients that are written from the protos alone, in Python and TypeScript, against a gateway over a fake router."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest
from conformance_support import Program, typescript

from moiety.testing import FakeEngine, eventually
from support.doors import ChatDoor

HERE = Path(__file__).parent
PROTOS = HERE.parents[1] / "protos"


@pytest.fixture(scope="session")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the stubs that protoc makes of the public proto."""
    tools = pytest.importorskip("grpc_tools.protoc", reason="needs the package grpcio-tools")
    out = tmp_path_factory.mktemp("stubs")
    folder = PROTOS / "moiety/v1"
    arguments = ["protoc", f"-I{folder}", f"--python_out={out}", f"--grpc_python_out={out}"]
    assert tools.main([*arguments, str(folder / "generation.proto")]) == 0
    return out


@pytest.fixture(params=["python", "typescript"])
def program(request: pytest.FixtureRequest) -> Program:
    """Runs an action of a client program against a door, and returns what it printed."""
    if request.param == "python":
        folder = request.getfixturevalue("stubs")
        return Program([sys.executable, str(HERE / "grpc_program.py")], {"PYTHONPATH": str(folder)})
    return typescript("grpc.js", ("PROTO", str(PROTOS / "moiety/v1/generation.proto")))


async def test_a_stream(chat_door: ChatDoor, router: FakeEngine, program: Program):
    """The program lists the models and gets the text, tokens, reason and usage that our own client gets."""
    async with chat_door(router) as door:
        seen = await program.run("stream", door.gateway.address)
        stream = door.gateway.client.generate("Each expert", temperature=0.9, seed=3, max_tokens=12)
        chunks = [chunk async for chunk in stream]
    assert seen == {
        "models": ["fake"],
        "text": "".join(chunk.text for chunk in chunks),
        "ids": [token for chunk in chunks for token in chunk.token_ids],
        "reason": "FINISH_REASON_LENGTH",
        "completion_tokens": 12,
        "timed": True,
    }


async def test_cancelling_ends_the_generation(chat_door: ChatDoor, router: FakeEngine, program: Program):
    """The router stops when the program cancels its call."""

    async def hold(position: int) -> None:
        if position == 2:
            await asyncio.Event().wait()

    router.before_token = hold
    async with chat_door(router) as door:
        assert (await program.run("cancel", door.gateway.address))["code"] == "CANCELLED"
        await eventually(lambda: router.cancelled == 1)


async def test_errors_have_codes_and_say_what_is_wrong(chat_door: ChatDoor, router: FakeEngine, program: Program):
    """A value out of bounds is INVALID_ARGUMENT with field, value and bound; an unknown model is NOT_FOUND."""
    async with chat_door(router) as door:
        wrong = await program.run("wrong", door.gateway.address)
        unknown = await program.run("unknown", door.gateway.address)
    assert wrong["code"] == "INVALID_ARGUMENT"
    assert "temperature = 99" in wrong["details"]
    assert "0 (greedy) to 10" in wrong["details"]
    assert unknown["code"] == "NOT_FOUND"
    assert "'other'" in unknown["details"]


async def test_a_refusal_says_when_to_try_again(chat_door: ChatDoor, router: FakeEngine, program: Program):
    """A full system answers RESOURCE_EXHAUSTED with the trailer retry-after-ms."""
    router.places = 0
    async with chat_door(router) as door:
        refused = await program.run("refused", door.gateway.address)
    assert refused["code"] == "RESOURCE_EXHAUSTED"
    assert int(refused["retry-after-ms"]) > 0
