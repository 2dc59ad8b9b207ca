"""The routers a gateway can ask: picks one per request, and carries a request on when its router is lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Set
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

import grpc

from moiety.core import Replica, ReplicaState, Role
from moiety.errors import DeadlineExceeded, MoietyError, Unavailable
from moiety.gateway.choices import behind, choices_of, merged
from moiety.load.watch import Watch
from moiety.wire import engine_pb2, engine_pb2_grpc, status
from moiety.wire.channels import channel
from moiety.wire.deadline import Deadline
from moiety.wire.metadata import with_traceparent

_log = logging.getLogger(__name__)
HANDSHAKE_S = 2.0
RETRY_S = 0.1


@dataclass(slots=True, eq=False)
class Router:
    """One router, as this gateway sees it."""

    replica: Replica
    channel: grpc.aio.Channel
    stub: engine_pb2_grpc.EngineStub
    description: engine_pb2.EngineDescription
    in_flight: int = 0


class Routers:
    """Ready routers, found through the registry."""

    def __init__(self, watch: Watch, wait_s: float):
        self._watch, self._wait_s = watch, wait_s
        self._routers: dict[str, Router] = {}
        self._dialling: dict[str, asyncio.Task[None]] = {}

    async def pick(self, deadline: Deadline, revision: str = "") -> Router:
        """The ready router with the least of our requests. Raises Unavailable when none appears in time."""
        waits = Deadline.after(min(self._wait_s, deadline.left()))
        while True:
            await self._refresh()
            ready = [router for router in self._routers.values() if not revision or router.replica.revision == revision]
            if ready:
                return min(ready, key=lambda router: (router.in_flight, router.replica.id))
            if deadline.passed:
                raise DeadlineExceeded("the deadline passed before a router was ready")
            if waits.passed:
                wanted = f" of revision {revision}" if revision else ""
                raise Unavailable(f"no router{wanted} is ready; waited {self._wait_s:g} s (setting router_wait_s)")
            await asyncio.sleep(RETRY_S)

    async def generate(
        self, request: engine_pb2.EngineRequest, deadline: Deadline, traceparent: str, ended: Set[int] = frozenset()
    ) -> AsyncGenerator[engine_pb2.EngineEvent, None]:
        """The request's events, to the end of every choice but those that the caller puts into `ended` meanwhile.

        A router lost on the way is replaced: another goes on behind the tokens of each unfinished choice.
        """
        done = {choice: list(request.generated_ids) for choice in choices_of(request)}
        while True:
            router = await self.pick(deadline, request.revision)
            request.revision = router.replica.revision  # one revision for life
            router.in_flight += 1
            call = router.stub.Generate(
                request,
                timeout=None if deadline == Deadline() else deadline.left(),
                metadata=with_traceparent(traceparent),
            )
            try:
                async for event in call:
                    done[event.choice].extend(event.token_ids)
                    request.sampling.prompt_logprobs = False  # they came with the first tokens
                    yield event
                    if event.finish_reason:
                        del done[event.choice]
                    if not done.keys() - ended:
                        return
                raise Unavailable(f"router {router.replica.id} ended the stream early")
            except (grpc.RpcError, Unavailable) as error:
                told = status.error_of(error) if isinstance(error, grpc.RpcError) else error
                if not isinstance(told, Unavailable) or not await self._is_lost(router):
                    raise told from None
                count = sum(map(len, done.values()))
                _log.warning("router %s is lost after %d tokens; going on elsewhere", router.replica.id, count)
            finally:
                router.in_flight -= 1
                call.cancel()
            left = [behind(request, choice, ids) for choice, ids in done.items() if choice not in ended]
            if len(left) == 1:
                (request,) = left
            elif any(done.values()) or len(left) < request.sampling.n:  # each goes on by itself, behind its own tokens
                streams = [self.generate(resumed, deadline, traceparent, ended) for resumed in left]
                async with aclosing(merged(streams)) as events:
                    async for event in events:
                        yield event
                return

    async def close(self) -> None:
        for task in self._dialling.values():
            task.cancel()
        await asyncio.gather(*(router.channel.close() for router in self._routers.values()))

    async def _refresh(self) -> None:
        """Brings the list of routers in line with the registry."""
        listed = {replica.id: replica for replica in self._ready()}
        for gone in self._routers.keys() - listed.keys():
            router = self._routers.pop(gone, None)  # another request may have dropped it while we closed one
            if router is not None and not router.in_flight:
                await router.channel.close()
        for new in listed.keys() - self._routers.keys() - self._dialling.keys():
            self._dialling[new] = asyncio.create_task(self._dial(listed[new]))
            self._dialling[new].add_done_callback(partial(self._dialled, new))
        if self._dialling and not self._routers:  # later ones are dialled beside the requests
            await asyncio.wait(self._dialling.values())

    def _dialled(self, router_id: str, _: asyncio.Task[None]) -> None:
        del self._dialling[router_id]

    async def _dial(self, replica: Replica) -> None:
        link = channel(replica.address)
        stub = engine_pb2_grpc.EngineStub(link)
        try:
            description = await stub.Describe(engine_pb2.EngineDescribeRequest(), timeout=HANDSHAKE_S)
        except grpc.RpcError as error:
            _log.debug("router %s does not answer yet: %s", replica.id, status.error_of(error))
            await link.close()
            return
        self._routers[replica.id] = Router(replica, link, stub, description)

    async def _is_lost(self, router: Router) -> bool:
        """Whether the router itself is gone or going, rather than telling us that something behind it is."""
        listed = any(replica.id == router.replica.id for replica in self._ready())
        try:
            await router.stub.Describe(engine_pb2.EngineDescribeRequest(), timeout=HANDSHAKE_S)
        except (grpc.RpcError, MoietyError):
            self._routers.pop(router.replica.id, None)
            return True
        return not listed

    def _ready(self) -> list[Replica]:
        return [r for r in self._watch.replicas if r.role is Role.ROUTER and r.state is ReplicaState.READY]
