"""One router, as this gateway sees it: its last report, this gateway's requests there, and what it should have cached."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import suppress

import grpc

from moiety.core.replica import Replica, ReplicaState
from moiety.core.supervise import spawn, supervise
from moiety.core.system import SystemId
from moiety.errors import MoietyError, PeerLost, WrongSystem
from moiety.gateway.routers.prefixes import PrefixIndex
from moiety.gateway.routers.prompt import Prompt
from moiety.internal.v1 import engine_pb2, engine_pb2_grpc
from moiety.policy.router_choice import Candidate
from moiety.policy.router_pace import Pace
from moiety.wire import status
from moiety.wire.channels import channel
from moiety.wire.deadline import Deadline
from moiety.wire.event_stream.call_client import CallClient

_log = logging.getLogger(__name__)
HANDSHAKE_S = 2.0
# As often as the registry is read. DescribeEngine costs a router some 0.2 ms: below 0.1 % of its time for each gateway.
POLL_S = 0.25
ASK_S = 0.25  # how long a router whose stream broke may take to answer
SILENT_S = 5.0  # a router whose connection lives but which answers no poll for so long hangs


class RouterPeer:
    """A router that has answered at least once, as this gateway sees it.

    Its load is what it last reported, plus the sequences that this gateway has sent it since, minus the sequences of this
    gateway that have ended since. Its link says more about it than the registry: a router that answers, lives.
    """

    def __init__(
        self,
        replica: Replica,
        system: SystemId,
        link: grpc.aio.Channel,
        description: engine_pb2.DescribeEngineResponse,
        on_poll: Callable[[RouterPeer], Awaitable[None]],
    ):
        """`on_poll` is called after every poll, answered or not."""
        self.replica, self._system, self._channel = replica, system, link
        self.stub = engine_pb2_grpc.EngineServiceStub(link)
        self._calls = CallClient(self.stub, f"router {replica.id}")
        self.pending_prompt_tokens = 0.0  # prompt tokens of those of our requests that have no first token yet
        self.lost = False  # its connection broke, or another system's router has its address
        self._answered = time.monotonic()  # when it answered last
        self.unresponsive = False  # it did not answer the last poll
        cached = description.block_tokens and description.blocks
        self.prefixes = PrefixIndex(description.blocks) if cached else None
        self.block_tokens = description.block_tokens
        self.slots = 0  # sequences that it runs at once; 0: not reported
        self._others = 0  # sequences of other gateways
        self._note(description, 0)
        self._left = False
        self._on_poll = on_poll
        self._asking: asyncio.Task[None] | None = None
        self._polling = supervise("router poll", self._poll)

    @classmethod
    async def dial(
        cls, replica: Replica, system: SystemId, on_poll: Callable[[RouterPeer], Awaitable[None]]
    ) -> RouterPeer | None:
        """Connects to a router; returns None if it does not answer yet. Raises WrongSystem if it is not of `system`."""
        link = channel(replica.address)
        try:
            stub = engine_pb2_grpc.EngineServiceStub(link)
            description = await _describe(stub, HANDSHAKE_S)
        except MoietyError as error:
            _log.debug("router %s does not answer yet: %s", replica.id, error)
            await link.close()
            return None
        if difference := system.difference(description.system):
            await link.close()
            raise WrongSystem(difference)
        return cls(replica, system, link, description, on_poll)

    @property
    def state(self) -> ReplicaState:
        """The router's own state, by its last report; DRAINING also where the registry says so."""
        if self.replica.state is ReplicaState.DRAINING:
            return ReplicaState.DRAINING
        with suppress(ValueError):
            return ReplicaState(self.description.state)
        return ReplicaState.READY

    @property
    def well(self) -> bool:
        """Whether the router is the right place for a new request."""
        return not self.unresponsive and self.state is ReplicaState.READY

    @property
    def must_hand_over(self) -> bool:
        """Whether its requests should move to a router that is well: this one is sick, or answers no poll."""
        return self.state is ReplicaState.SICK or time.monotonic() - self._answered > SILENT_S

    @property
    def in_flight(self) -> int:
        """Sequences of this gateway that the router has not ended. What a client has not read yet takes no slot."""
        return self._calls.open.choices

    @property
    def load(self) -> int:
        """Sequences of all gateways at this router, running or waiting."""
        return self._others + self.in_flight

    @property
    def full_of_own_requests(self) -> bool:
        """Whether this gateway's own requests fill the router's slots and queue.

        The router would refuse one more request. Sending it would take time from the requests that the router serves.
        """
        description = self.description
        return 0 < description.queue_limit <= self._calls.open.calls - description.slots

    def candidate(self, prompt: Prompt, pace: Pace) -> Candidate:
        """Returns what `router_choice.choose` compares: load, slots, pending prompt tokens and the cached part of `prompt`."""
        cached = 0.0
        if self.prefixes is not None and (matched := self.prefixes.match(prompt.hashes(self.block_tokens))):
            cached = pace.found.value * matched * self.block_tokens
        return Candidate(self._others + self.in_flight, self.slots, self.pending_prompt_tokens, cached)

    def hashes(self, prompt: Prompt) -> Sequence[int]:
        """Returns the hashes of the prompt's blocks, in this router's block size; empty if the router caches no prefixes."""
        return prompt.hashes(self.block_tokens) if self.prefixes is not None else ()

    def generate(
        self, request: engine_pb2.EngineRequest, deadline: Deadline, traceparent: str
    ) -> AsyncGenerator[engine_pb2.EngineEvent, None]:
        """Sends a request to the router and yields its events; see `CallClient.generate`."""
        return self._calls.generate(request, deadline, traceparent)

    async def poll(self, timeout_s: float = HANDSHAKE_S) -> bool:
        """Asks the router for its load and stores the answer. Returns False if it does not answer, or another one does."""
        if self.lost:
            return False
        before = self.in_flight
        try:
            report = await _describe(self.stub, timeout_s)
        except MoietyError as error:
            self.unresponsive = True
            if isinstance(error, PeerLost):  # no connection, or it has ended
                await self._lose()
            return False
        if self._system.difference(report.system):  # a router of another system has got the address of a lost one
            await self._lose()
            return False
        self.unresponsive, self._answered = False, time.monotonic()
        # The report may or may not count requests of ours that began or ended meanwhile. Taking the larger number rather
        # misses a sequence of another gateway than invents one.
        self._note(report, max(before, self.in_flight))
        return True

    async def survived(self) -> bool:
        """Returns whether the router answers within ASK_S. All requests of a broken stream ask at once: one poll is enough."""
        if self._asking is None or self._asking.done():
            self._asking = spawn("router poll", self._ask())
        await asyncio.shield(self._asking)
        return not (self.unresponsive or self.lost)

    async def hand_over(self) -> None:
        """Breaks the stream, so that this gateway's requests at the router move. Later ones may come back."""
        await self._calls.close()

    async def leave(self) -> None:
        """Marks the router as leaving. Its channel closes when the last of this gateway's requests at the router ends."""
        self._left = True
        self._polling.cancel()
        await self.close_if_done()

    async def close(self) -> None:
        self._polling.cancel()
        await asyncio.wait([self._polling])
        await self._hang_up()

    async def close_if_done(self) -> None:
        """Closes the channel if the router is leaving and no request of this gateway runs on it. Call it after each request."""
        if self._left and not self.in_flight:
            await self._hang_up()

    async def _hang_up(self) -> None:
        await self._calls.close()
        await self._channel.close()

    def _note(self, report: engine_pb2.DescribeEngineResponse, ours: int) -> None:
        """Stores a router's report of its load, which includes `ours` sequences of this gateway."""
        self.description = report
        self._others = max(report.running + report.waiting - ours, 0)
        # While requests wait for KV cache, the router runs fewer sequences than it has slots.
        self.slots = min(report.slots, report.running) if report.waiting and report.running else report.slots

    async def _ask(self) -> None:
        await self.poll(ASK_S)

    async def _lose(self) -> None:
        """Moves the requests at a router that is lost: gRPC 1.85 sometimes forgets a stream whose connection has ended."""
        self.lost = True
        await self._calls.close()

    async def _poll(self) -> None:
        while not self.lost:
            await asyncio.sleep(POLL_S)
            await self.poll()
            await self._on_poll(self)


def best_of(routers: Iterable[RouterPeer]) -> list[RouterPeer]:
    """Returns the routers for new requests: those that are well, else those that drain, else those that answer, else all."""
    known = list(routers)
    answering = [router for router in known if not router.unresponsive]
    for state in (ReplicaState.READY, ReplicaState.DRAINING):
        if best := [router for router in answering if router.state is state]:
            return best
    return answering or known


async def _describe(stub: engine_pb2_grpc.EngineServiceStub, timeout_s: float) -> engine_pb2.DescribeEngineResponse:
    """Returns the router's answer to DescribeEngine. Raises PeerLost, or another error with which the call failed."""
    try:
        report = await stub.DescribeEngine(engine_pb2.DescribeEngineRequest(), timeout=timeout_s)
    except grpc.RpcError as error:
        raise status.error_of(error) from None
    except grpc.aio.UsageError:  # another request has found the router lost, and closed the channel
        raise PeerLost("its channel is closed") from None
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise PeerLost("its channel was closed meanwhile") from None  # which cancels the call, not this task
    return status.parsed(report)
