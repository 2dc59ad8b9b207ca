"""What the router refuses at its door, before a request reaches the engine, and what a gateway sees of errors."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from moiety.core.replica import ReplicaState
from moiety.core.sampling import FinishReason
from moiety.errors import InvalidRequest, MoietyError
from moiety.internal.v1 import engine_pb2, engine_pb2_grpc
from moiety.router.engine import EngineLoad
from moiety.router.sequence.guides import Guides
from moiety.router.sequence.sequence import Emitted, Sequence
from moiety.router.service import EngineService
from moiety.synthetic.tokenizer import write_tokenizer
from moiety.telemetry.tracing import NO_TRACER
from moiety.testing import HOST, SYSTEM
from moiety.v1 import generation_pb2
from moiety.wire.channels import channel
from moiety.wire.deadline import Deadline
from moiety.wire.event_stream.call_client import CallClient
from moiety.wire.server import Server
from moiety.wire.service_names import ENGINE_SERVICE

VOCABULARY, CONTEXT = 320, 64


class OneTokenEngine:
    """Ends every request with one token."""

    queue_limit, block_tokens, blocks = 4, 4, 4
    load = EngineLoad(0, 0, 4)

    def __init__(self) -> None:
        self.submitted: list[Sequence] = []

    def submit(self, sequence: Sequence) -> None:
        """Takes a request, unless its tenant is "bug"."""
        if sequence.tenant == "bug":
            raise KeyError("secret")
        self.submitted.append(sequence)
        sequence.emit(Emitted((7,), finish=FinishReason.LENGTH))

    def cancel(self, sequence: Sequence) -> None:
        """Does nothing: every request has ended."""


@asynccontextmanager
async def router(folder: Path) -> AsyncIterator[tuple[OneTokenEngine, CallClient]]:
    """A router's service over the engine, and a gateway's stream to it, for at most 20 s."""
    write_tokenizer(folder)
    engine, guides = OneTokenEngine(), Guides(str(folder), VOCABULARY, threads=1)
    service = EngineService(
        engine,  # type: ignore[arg-type]
        "fake",
        SYSTEM,
        vocabulary=VOCABULARY,
        max_context=CONTEXT,
        slots=4,
        guides=guides,
        tracer=NO_TRACER,
        state=lambda: ReplicaState.READY,
    )
    server = Server([], [ENGINE_SERVICE])
    engine_pb2_grpc.add_EngineServiceServicer_to_server(service, server.grpc)
    address = f"{HOST}:{await server.start(HOST, 0)}"
    async with asyncio.timeout(20), channel(address) as link:
        client = CallClient(engine_pb2_grpc.EngineServiceStub(link), "the router")
        yield engine, client
        await client.close()
    await server.stop(0)
    guides.close()


def request(**fields: object) -> engine_pb2.EngineRequest:
    """Returns a good request of two tokens with `fields` changed."""
    good = {"request_id": "mine", "prompt_ids": [5, 6], "sampling": generation_pb2.SamplingParams(max_tokens=2, n=1)}
    return engine_pb2.EngineRequest(system_key=SYSTEM.key, **{**good, **fields})  # type: ignore[arg-type]


def sampling(**fields: object) -> generation_pb2.SamplingParams:
    """Returns sampling parameters for two tokens with `fields` changed."""
    return generation_pb2.SamplingParams(**{"max_tokens": 2, "n": 1, **fields})  # type: ignore[arg-type]


async def tokens(client: CallClient, asked: engine_pb2.EngineRequest) -> list[int]:
    """Sends a request; returns its tokens."""
    return [token async for event in client.generate(asked, Deadline(), "") for token in event.token_ids]


BAD: dict[str, tuple[Callable[[], engine_pb2.EngineRequest], str]] = {
    "more generated tokens than are asked for": (
        lambda: request(generated_ids=[1, 2]),
        "generated_ids = '2 tokens': must be fewer than max_tokens, 2",
    ),
    "far too many generated tokens": (lambda: request(generated_ids=[1] * 100_000), "generated_ids = '100000 tokens'"),
    "far too many prompt tokens": (lambda: request(prompt_ids=[1] * 100_000), "prompt = '100000 tokens'"),
    "a priority beyond all others": (lambda: request(priority=10**9), "priority = 1000000000: must be -100 to 100"),
    "a huge tenant": (lambda: request(tenant="x" * 1000), "tenant"),
    "stop strings": (lambda: request(sampling=sampling(stop=["x"])), "sampling.stop = '1 strings': must be empty"),
    "the text of a first token": (
        lambda: request(sampling=sampling(first_token="fra_Latn")),
        "sampling.first_token = 'fra_Latn': must be resolved by a gateway",
    ),
    "a choice of no request": (lambda: request(choice=10**6), "choice = 1000000: must be at most 16 - n"),
    "many ends": (lambda: request(stop_ids=[1] * 1000), "stop_ids = '1000 ids': must be at most 256 ids"),
    "a guide without an output": (
        lambda: request(sampling=sampling(guide=generation_pb2.Guide(json_schema="false"))),
        "no output can match it",
    ),
}


async def test_a_router_refuses_what_no_gateway_of_its_version_sends(tmp_path: Path):
    """Each bad request gets an error that names field, value and bound, and the engine never sees it."""
    async with router(tmp_path) as (engine, client):
        for name, (bad, words) in BAD.items():
            with pytest.raises(InvalidRequest) as refused:
                await tokens(client, bad())
            assert words in str(refused.value), name
        assert not engine.submitted
        assert await tokens(client, request()) == [7]


async def test_an_unexpected_error_reaches_a_gateway_without_its_text(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """The gateway gets the request's id, under which the router's log has the error; other requests go on."""
    async with router(tmp_path) as (_, client):
        with pytest.raises(MoietyError, match=r"^internal error; the service's log has it under request id mine$"):
            await tokens(client, request(tenant="bug"))
        (logged,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
        assert "request mine failed" in logged.message
        assert await tokens(client, request()) == [7]
