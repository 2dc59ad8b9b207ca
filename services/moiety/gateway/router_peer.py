"""One router, as this gateway sees it: what it told last, what this gateway has there, and what it should have cached."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence

import grpc

from moiety.core.replica import Replica
from moiety.gateway.prefixes import PrefixIndex
from moiety.gateway.prompt import Prompt
from moiety.internal.v1 import engine_pb2, engine_pb2_grpc
from moiety.policy.router_choice import Candidate
from moiety.policy.router_pace import Pace
from moiety.wire import status
from moiety.wire.channels import channel
from moiety.wire.deadline import Deadline
from moiety.wire.event_stream import CallClient

_log = logging.getLogger(__name__)
HANDSHAKE_S = 2.0
# As often as the registry is read. A Describe costs a router some 0.2 ms: below 0.1 % of its time for each gateway.
POLL_S = 0.25


class RouterPeer:
    """A router that has answered once. Its load is what it told last, brought up to date by what we have done since."""

    def __init__(self, replica: Replica, link: grpc.aio.Channel, description: engine_pb2.DescribeEngineResponse):
        self.replica, self._channel = replica, link
        self.stub = engine_pb2_grpc.EngineServiceStub(link)
        self._calls = CallClient(self.stub, f"router {replica.id}")
        self.requests = 0  # of ours
        self.in_flight = 0  # their sequences
        self.ahead = 0.0  # prompt tokens of ours whose first token has not come
        self.silent = False  # it left a poll without an answer
        cached = description.block_tokens and description.blocks
        self.prefixes = PrefixIndex(description.blocks) if cached else None
        self.block_tokens = description.block_tokens
        self.slots = 0  # sequences that it runs at once; 0: not told
        self._others = 0  # sequences of other gateways
        self._note(description, 0)
        self._left = False
        self._polling = asyncio.create_task(self._poll())

    @classmethod
    async def dial(cls, replica: Replica) -> RouterPeer | None:
        """None where it does not answer, for now."""
        link = channel(replica.address)
        try:
            stub = engine_pb2_grpc.EngineServiceStub(link)
            description = await stub.DescribeEngine(engine_pb2.DescribeEngineRequest(), timeout=HANDSHAKE_S)
        except grpc.RpcError as error:
            _log.debug("router %s does not answer yet: %s", replica.id, status.error_of(error))
            await link.close()
            return None
        return cls(replica, link, description)

    @property
    def load(self) -> int:
        """Sequences there, running or waiting, everybody's."""
        return self._others + self.in_flight

    @property
    def packed(self) -> bool:
        """Whether our own requests fill it: one more would be refused, and to ask costs those who are served."""
        told = self.description
        return 0 < told.queue_limit <= self.requests - told.slots

    def candidate(self, prompt: Prompt, pace: Pace) -> Candidate:
        """What the choice of a router wants to know of this one."""
        cached = 0.0
        if self.prefixes is not None and (matched := self.prefixes.match(prompt.hashes(self.block_tokens))):
            cached = pace.found.value * matched * self.block_tokens
        return Candidate(self._others + self.in_flight, self.slots, self.ahead, cached)

    def hashes(self, prompt: Prompt) -> Sequence[int]:
        """Of the blocks of a prompt; none where it caches no prefixes."""
        return prompt.hashes(self.block_tokens) if self.prefixes is not None else ()

    def generate(
        self, request: engine_pb2.EngineRequest, deadline: Deadline, traceparent: str
    ) -> AsyncGenerator[engine_pb2.EngineEvent, None]:
        """The request's events; see `CallClient.generate`."""
        return self._calls.generate(request, deadline, traceparent)

    async def answers(self) -> bool:
        """Whether it answers now; its load is known then."""
        before = self.in_flight
        try:
            told = await self.stub.DescribeEngine(engine_pb2.DescribeEngineRequest(), timeout=HANDSHAKE_S)
        except grpc.RpcError:
            return False
        # Ours that came or went meanwhile may be counted in what it told, or not; better miss one than invent one.
        self._note(told, max(before, self.in_flight))
        return True

    async def leave(self) -> None:
        """Sends it nothing more; its channel closes with the last of our requests there."""
        self._left = True
        self._polling.cancel()
        await self.close_if_done()

    async def close(self) -> None:
        self._polling.cancel()
        await asyncio.wait([self._polling])
        await self._hang_up()

    async def close_if_done(self) -> None:
        """For whoever ends a request there."""
        if self._left and not self.in_flight:
            await self._hang_up()

    async def _hang_up(self) -> None:
        await self._calls.close()
        await self._channel.close()

    def _note(self, told: engine_pb2.DescribeEngineResponse, ours: int) -> None:
        """What it told, `ours` of its sequences among it."""
        self.description = told
        self._others = max(told.running + told.waiting - ours, 0)
        # Where requests wait for room in its KV cache it runs fewer than it has slots for.
        self.slots = min(told.slots, told.running) if told.waiting and told.running else told.slots

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            self.silent = not await self.answers()
