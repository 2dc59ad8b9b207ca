"""The routers of a gateway: chooses one for each request, and resumes a request elsewhere when its router is lost."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Mapping, Set
from contextlib import aclosing
from functools import partial

from moiety.core.replica import Replica, ReplicaState, Role
from moiety.core.supervise import spawn
from moiety.core.system import SystemId
from moiety.errors import DeadlineExceeded, ResourceExhausted, Unavailable, WrongSystem
from moiety.gateway.merge import merge_streams
from moiety.gateway.routers.attempt import Attempt
from moiety.gateway.routers.backlog import Backlog
from moiety.gateway.routers.prefixes import PrefixHasher
from moiety.gateway.routers.prompt import Prompt
from moiety.gateway.routers.resumption import choices_of, resumed_request
from moiety.gateway.routers.router_peer import RouterPeer, best_of
from moiety.internal.v1 import engine_pb2
from moiety.policy import router_choice
from moiety.policy.router_pace import Pace
from moiety.registry.watch import Watch
from moiety.wire.deadline import Deadline
from moiety.wire.event_stream.call_client import StreamBroken

_log = logging.getLogger(__name__)
RETRY_S = 0.1
REDIAL_S = 0.5  # a listed router of another system is dialled again this often
MOST_LOSSES = 5
UNKNOWN_WAIT_S = 1.0  # retry delay before any request has shown how long one takes
USABLE = (ReplicaState.READY, ReplicaState.DRAINING, ReplicaState.SICK)  # states of a router that may get requests


class RouterLost(Unavailable):
    """The router of a request no longer answers or is leaving. The request can resume on another router."""


class RouterPool:
    """Finds routers in the registry, sends each request to one of them, and resumes it elsewhere after a loss.

    A live link outranks the registry. A router that answers stays in use, though it is no longer listed, until it says that
    it leaves. A router whose link breaks is out of use at once, though it is listed.
    """

    def __init__(self, watch: Watch, system: SystemId, wait_s: float, seed: int = 0):
        """`system`: the gateway's; routers of another one are not used. `wait_s`: longest wait for a ready router, in seconds.

        `seed` determines the random choice of routers to compare, and the keys of hashes. Each gateway needs its own.
        """
        self._watch, self._system, self._wait_s = watch, system, wait_s
        self._routers: dict[str, RouterPeer] = {}
        self._dialling: dict[str, asyncio.Task[None]] = {}
        self._refused: dict[str, str] = {}  # listed router -> why it is not used, logged once
        self._seen: tuple[Replica, ...] | None = None  # the registry's table that the next two reflect
        self._listed: Mapping[str, Replica] = {}  # routers that may be used
        self._ended = ""  # why every request ends
        self._pace, self._backlog = Pace(), Backlog()
        self._random = random.Random(seed)
        self._hasher = PrefixHasher(self._random.getrandbits(64))

    async def pick(self, deadline: Deadline) -> RouterPeer:
        """Returns the least loaded ready router. Raises Unavailable or DeadlineExceeded when none appears in time."""
        return min(await self._ready(deadline), key=lambda router: (router.load, router.replica.id))

    async def generate(
        self,
        request: engine_pb2.EngineRequest,
        deadline: Deadline,
        traceparent: str,
        ended: Set[int] = frozenset(),
        *,
        accepted: bool = False,
    ) -> AsyncGenerator[engine_pb2.EngineEvent, None]:
        """Yields the request's events until every choice has ended; the caller may end choices by adding them to `ended`.

        If the router is lost, another one resumes each unfinished choice after the tokens that were sent. If a router's
        queue is full, the next router is tried. Raises ResourceExhausted if all queues are full, Unavailable if MOST_LOSSES
        routers in a row are lost before they send anything: the request may be what ends them. A request that a router has
        `accepted` before first waits for a place, at most `wait_s` seconds.
        """
        done, losses = {choice: list(request.generated_ids) for choice in choices_of(request)}, 0
        while True:
            try:
                async with aclosing(self._placed(request, deadline, traceparent, accepted)) as events:
                    async for event in events:
                        losses = 0
                        done[event.choice].extend(event.token_ids)
                        request.sampling.prompt_logprobs = False  # they were sent with the first tokens
                        if event.finish_reason:
                            del done[event.choice]
                        yield event
                        if not done.keys() - ended:
                            return
            except RouterLost as lost:
                if self._ended:
                    raise Unavailable(self._ended) from None
                _log.debug("%s after %d tokens; another router resumes", lost, sum(map(len, done.values())))
                if (losses := losses + 1) >= MOST_LOSSES:
                    raise Unavailable(f"{losses} routers in a row were lost with this request; last: {lost}") from None
            accepted = True
            unfinished = [resumed_request(request, choice, ids) for choice, ids in done.items() if choice not in ended]
            if len(unfinished) == 1:
                (request,) = unfinished
            elif any(done.values()) or len(unfinished) < request.sampling.n:  # each resumes after its own tokens
                streams = [self.generate(one, deadline, traceparent, ended, accepted=True) for one in unfinished]
                async with aclosing(merge_streams(streams)) as events:
                    async for event in events:
                        yield event
                return

    def check_room(self) -> None:
        """Raises ResourceExhausted if this gateway's own requests fill every router. Call it before any work on a prompt."""
        if (best := best_of(self._routers.values())) and all(router.full_of_own_requests for router in best):
            raise self._full(len(best))

    def retry_after_s(self) -> float:
        """Returns the retry delay, in seconds, of a request that is refused now, and expects the request back after it."""
        return self._backlog.refuse(self._predicted_wait_s)

    async def end(self, why: str) -> None:
        """Ends every request, now and later, with Unavailable(`why`)."""
        self._ended = why
        await asyncio.gather(*(router.hand_over() for router in self._routers.values()))

    async def close(self) -> None:
        for task in self._dialling.values():
            task.cancel()
        await asyncio.gather(*(router.close() for router in self._routers.values()))

    async def _placed(
        self, request: engine_pb2.EngineRequest, deadline: Deadline, traceparent: str, accepted: bool
    ) -> AsyncGenerator[engine_pb2.EngineEvent, None]:
        """Yields the request's events from the first router that accepts it. Raises RouterLost when that router is lost."""
        prompt, full, started = Prompt(request, self._hasher), dict[str, float](), False
        waits = Deadline.after(min(self._wait_s, deadline.left()) if accepted else 0.0)
        while True:
            ready = await self._ready(deadline)
            full |= {router.replica.id: RETRY_S for router in ready if router.full_of_own_requests}
            ready_ids = {router.replica.id for router in ready}
            if ready_ids <= full.keys():
                soonest = min(full[router_id] for router_id in ready_ids)
                if waits.passed:
                    raise self._full(len(ready), soonest)
                await asyncio.sleep(min(soonest, waits.left()))
                full.clear()
                continue  # routers may have come and gone
            router = self._choose(request, prompt, [router for router in ready if router.replica.id not in full])
            try:
                async with aclosing(self._stream(router, request, prompt, deadline, traceparent)) as events:
                    async for event in events:
                        started = True
                        yield event
                return
            except ResourceExhausted as refusal:
                if started:
                    raise
                full[router.replica.id] = refusal.retry_after_s

    def _full(self, routers: int, least_s: float = 0.0) -> ResourceExhausted:
        queues = "queue of the only router is" if routers == 1 else f"queues of all {routers} routers are"
        return ResourceExhausted(f"the {queues} full", max(self.retry_after_s(), least_s))

    def _predicted_wait_s(self, expected: int) -> float:
        """Returns the predicted wait for a slot, in seconds, at the router where it is shortest.

        Assumes that `expected` refused requests return first, spread evenly over the routers.
        """
        if not self._pace.known or not (best := best_of(self._routers.values())):
            return UNKNOWN_WAIT_S
        before = expected / len(best)
        return min(self._pace.slot_wait(router.load + before, router.slots) for router in best)

    def _choose(self, request: engine_pb2.EngineRequest, prompt: Prompt, routers: list[RouterPeer]) -> RouterPeer:
        candidates = [router.candidate(prompt, self._pace) for router in routers]
        draw = self._random.getrandbits(32)
        choice = router_choice.choose(candidates, self._pace, prompt.tokens, prompt.max_tokens, draw)
        chosen = routers[choice.index]
        if _log.isEnabledFor(logging.DEBUG):
            _log.debug("request %s goes to router %s: %s", request.request_id, chosen.replica.id, choice.reason)
        return chosen

    async def _stream(
        self,
        router: RouterPeer,
        request: engine_pb2.EngineRequest,
        prompt: Prompt,
        deadline: Deadline,
        traceparent: str,
    ) -> AsyncGenerator[engine_pb2.EngineEvent, None]:
        """Sends the request to `router` and yields its events. Raises RouterLost if the router is lost."""
        attempt = Attempt(router, prompt, self._pace)
        try:
            async with aclosing(router.generate(request, deadline, traceparent)) as events:
                async for event in events:
                    self._pace = attempt.event(event, self._pace)
                    if request.generated_ids:
                        event.cached_tokens = 0  # counts output too; the client already has the count of its prompt
                    yield event
        except Unavailable as error:
            if await self._is_lost(router, error):
                raise RouterLost(f"router {router.replica.id} is lost: {error}") from None
            raise error from None
        finally:
            self._pace = attempt.end(self._pace)
            await router.close_if_done()

    async def _ready(self, deadline: Deadline) -> list[RouterPeer]:
        """Returns the best routers (`best_of`). Raises Unavailable or DeadlineExceeded when none appears in time."""
        waits = Deadline.after(min(self._wait_s, deadline.left()))
        while True:
            await self._refresh()
            if self._ended:
                raise Unavailable(self._ended)
            if ready := best_of(self._routers.values()):
                return ready
            if deadline.passed:
                raise DeadlineExceeded("the deadline passed before a router was ready")
            if waits.passed:
                others = "".join(f"; router {router} is not used: {why}" for router, why in self._refused.items())
                raise Unavailable(f"no router is ready; waited {self._wait_s:g} s (setting router_wait_s){others}")
            await asyncio.sleep(RETRY_S)

    async def _refresh(self) -> None:
        """Drops routers that have left or are lost, and dials those that the registry lists."""
        self._read_table()
        await self._drop_lost()
        self._dial_listed()
        if self._dialling and not self._routers:  # with a router to use, others are dialled in the background
            await asyncio.wait(self._dialling.values())

    def _read_table(self) -> None:
        if self._watch.replicas is not self._seen:
            self._seen = self._watch.replicas
            routers = {replica.id: replica for replica in self._seen if replica.role is Role.ROUTER}
            self._listed = {name: replica for name, replica in routers.items() if replica.state in USABLE}
            self._refused = {name: why for name, why in self._refused.items() if name in self._listed}
            for name in self._routers.keys() & self._listed.keys():
                self._routers[name].replica = self._listed[name]

    async def _drop_lost(self, spare: RouterPeer | None = None) -> None:
        for router in [router for router in self._routers.values() if router is not spare and self._has_left(router)]:
            await self._drop(router)

    def _dial_listed(self) -> None:
        for name in self._listed.keys() - self._routers.keys() - self._dialling.keys():
            self._dialling[name] = spawn("router dial", self._dial(self._listed[name]))
            self._dialling[name].add_done_callback(partial(self._dialled, name))

    def _has_left(self, router: RouterPeer) -> bool:
        return router.lost or (router.replica.id not in self._listed and router.unresponsive)

    async def _drop(self, router: RouterPeer) -> None:
        """Takes a router out of use. It is dialled again while it is listed."""
        if self._routers.get(router.replica.id) is router:  # it may have been dropped while another one was closed
            del self._routers[router.replica.id]
            why = "has left" if router.state is ReplicaState.DRAINING else "is lost"
            _log.warning("router %s is no longer used: it %s", router.replica.id, why)
            await router.leave()

    async def _polled(self, router: RouterPeer) -> None:
        """Drops and dials routers without waiting for a request, and moves requests from a router that is sick or hangs."""
        self._read_table()
        await self._drop_lost(spare=router)  # its own task runs here: the next request drops it
        self._dial_listed()
        if router.in_flight and router.must_hand_over and any(other.well for other in self._routers.values()):
            _log.warning("router %s is %s; its requests move", router.replica.id, router.state)
            await router.hand_over()

    def _dialled(self, router_id: str, _: asyncio.Task[None]) -> None:
        del self._dialling[router_id]

    async def _dial(self, replica: Replica) -> None:
        try:
            router = await RouterPeer.dial(replica, self._system, self._polled)
        except WrongSystem as error:
            if self._refused.get(replica.id) != str(error):
                self._refused[replica.id] = str(error)
                _log.warning("router %s at %s is not used: %s", replica.id, replica.address, error)
            await asyncio.sleep(REDIAL_S)
            return
        if router is not None and not self._has_left(router):
            self._routers[replica.id] = router
            router.replica = self._listed.get(replica.id, replica)
        elif router is not None:
            await router.close()

    async def _is_lost(self, router: RouterPeer, error: Unavailable) -> bool:
        """Returns whether a request that ended with `error` should resume, on another router or over a new stream.

        If not, the error has another cause, such as an expert that has no holder.
        """
        broken = isinstance(error, StreamBroken)
        answers = await (router.survived() if broken else router.poll())
        if not answers:
            await self._drop(router)
        return broken or not answers or self._has_left(router)
