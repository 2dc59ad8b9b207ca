"""The expert replicas a router can reach: follows the registry, publishes the holder table, sends calls.

It follows the registry on the router's asyncio loop. The engine's thread owns the mailbox and the breakers, calls `send`,
handles the answers and reads `table`. Each update replaces `table` by a new object.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import partial
from operator import ne

import numpy as np

from moiety.core.experts import ExpertSet, ModelShape
from moiety.core.replica import Replica, ReplicaState, Role, Transport
from moiety.core.supervise import spawn, supervise
from moiety.core.system import SystemId
from moiety.errors import MoietyError, PeerLost, ResourceExhausted
from moiety.internal.v1.experts_pb2 import OUTCOME_OK, OUTCOME_OVERLOADED, ForwardRequest, ForwardResponse
from moiety.policy.dispatch import HolderTable, ReplicaHolding, holders
from moiety.registry.watch import Watch
from moiety.router.hop.breaker import Breakers
from moiety.router.hop.links import HANDSHAKE_S, Links
from moiety.wire.rows import RowBuffer, copy_rows
from moiety.wire.transports.connection import Answer, Reply
from moiety.wire.transports.expert_link import ExpertLink
from moiety.wire.transports.mailbox import Mailbox

_log = logging.getLogger(__name__)

FOLLOW_S = 0.25  # how often replicas that are listed and not linked are looked at, if the list does not change
DESCRIBE_S = 0.25  # between two DescribeReplica calls to a replica that refuses; doubled while nothing changes
LONGEST_DESCRIBE_S = 30.0


class Fleet:
    """Live expert replicas of one system. A replica leaves the table the moment its connection breaks."""

    def __init__(
        self, watch: Watch, shape: ModelShape, system: SystemId, dtype: str, transport: Transport = Transport.AUTO
    ):
        self.mailbox = Mailbox()  # the engine thread's: receives answers and changes of the table
        self.table = HolderTable.build(0, {}, shape.moe_layers, shape.experts)
        self.breakers = Breakers()
        # replica id -> experts that it may be called for; `table` was built from it.
        self._callable: Mapping[str, ExpertSet] = {}
        self._watch, self._shape = watch, shape
        self._links = Links(
            shape,
            system,
            dtype,
            transport,
            self.mailbox,
            opened=self._opened,
            lost=self._lost,
            unasked=lambda replica: self.breakers.failed(replica, time.monotonic(), "an answer that fits no open call"),
        )
        self._holdings: dict[str, ReplicaHolding] = {}  # by replica id
        # Latest placement that `table` follows completely: no replica is called for an expert that it drops by it.
        self.placement_epoch = 0
        self._deployments: dict[str, str] = {}
        self._known: frozenset[str] = frozenset()  # replicas that are listed, or linked still
        self._task: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        # Of the engine's thread:
        self._memories: list[Callable[[Collection[str]], None]] = [self.breakers.keep]
        self._call_ids = itertools.count(1)
        self._table_listeners: list[Callable[[], None]] = []
        self._room_listeners: list[Callable[[], None]] = []
        self._unanswered: dict[int, Answer] = {}  # by call id, cancelled ones too: who takes the answer
        self._answered_at: dict[str, float] = {}  # replica id -> time.monotonic() of its last answer
        # replica id -> when it may be asked again what it holds, and the delay after that
        self._describe: dict[str, tuple[float, float]] = {}

    def start(self) -> None:
        self._task = supervise("expert fleet", self._follow)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._links.close()
        await asyncio.to_thread(self.mailbox.drain)

    # The engine's thread -----------------------------------------------------------------------------------------

    def listen(self, table_changed: Callable[[], None], room_freed: Callable[[], None]) -> Callable[[], None]:
        """Registers callbacks: after `table` or `placement_epoch` is updated; after a replica has answered a call.

        Returns a function to unregister both.
        """
        self._table_listeners.append(table_changed)
        self._room_listeners.append(room_freed)

        def stop() -> None:
            self._table_listeners.remove(table_changed)
            self._room_listeners.remove(room_freed)

        return stop

    def add_memory(self, keep: Callable[[Collection[str]], None]) -> None:
        """Registers what is remembered per replica: `keep(replicas)` is called when others have left, to forget these."""
        self._memories.append(keep)

    def next_call_id(self) -> int:
        """Returns an id that is unique among the calls of all lanes of this router."""
        return next(self._call_ids)

    def deployment_of(self, replica_id: str) -> str:
        return self._deployments.get(replica_id, "")

    def kind_of(self, replica_id: str) -> str:
        """Returns the replica's kind, for the cost model; "" if it has left."""
        link = self._links.get(replica_id)
        return "" if link is None else link.description.kind[:80]

    def answered_since(self, replica_id: str, since: float) -> bool:
        """Whether the replica has answered any call after `since`, in seconds of `time.monotonic()`."""
        return self._answered_at.get(replica_id, 0.0) > since

    def send(
        self,
        replica_id: str,
        header: ForwardRequest,
        rows: RowBuffer,
        tokens: np.ndarray,
        reply_rows: int,
        answer: Answer,
    ) -> None:
        """Sends rows[tokens] as one call. `answer` is called once, on the engine's thread, after this method returned.

        `answer` gets PeerLost if the connection is lost or the replica has left, and a reply with the outcome OVERLOADED if
        the send buffer is full.
        """
        call_id = header.call_id
        if (link := self._links.get(replica_id)) is None:
            self.mailbox.post(partial(answer, PeerLost(f"replica {replica_id} has left")))
            return
        try:
            buffer = link.connection.acquire(header, rows=len(tokens), row_bytes=rows.row_bytes, reply_rows=reply_rows)
        except ResourceExhausted as error:
            full = ForwardResponse(outcome=OUTCOME_OVERLOADED, detail=str(error))
            self.mailbox.post(partial(answer, Reply(full, memoryview(b""))))
            return
        copy_rows(rows, buffer.rows, chosen=tokens)

        def on_answer(result: Reply | PeerLost) -> None:
            answer = self._unanswered.pop(call_id)
            if isinstance(result, Reply):
                self._answered_at[replica_id] = now = time.monotonic()
                self.breakers.answered(replica_id, now)
                if self._room_listeners and result.header.outcome == OUTCOME_OK:
                    self.mailbox.post(lambda: _notify(self._room_listeners))  # the transport still holds the room
            answer(result)

        self._unanswered[call_id] = answer
        buffer.send(on_answer)

    def cancel(self, replica_id: str, call_id: int, attempt: int) -> None:
        """Tells a replica that the answer to a call is no longer needed. Has no effect once the call is answered."""
        if call_id in self._unanswered:
            self._unanswered[call_id] = _ignore  # a replica that hangs must not keep the rows of its calls in memory
            if (link := self._links.get(replica_id)) is not None:
                link.connection.cancel(call_id, attempt)

    def overtaken(self, replica_id: str, call_id: int, limit_s: float) -> None:
        """Notes that a hedge of a call was answered before the call, unless that is answered by now. `limit_s`: its limit."""
        if call_id in self._unanswered:
            self.breakers.overtaken(replica_id, time.monotonic(), limit_s)

    def not_held(self, replica_id: str, why: str) -> None:
        """Notes that a replica refused a call because it lacks an expert or belongs to another system.

        Asks it again what it holds, less and less often while the answer stays the same.
        """
        now = time.monotonic()
        self.breakers.failed(replica_id, now, why)
        next_at, delay_s = self._describe.get(replica_id, (0.0, DESCRIBE_S))
        if now >= next_at:
            self._describe[replica_id] = now + delay_s, min(2 * delay_s, LONGEST_DESCRIBE_S)
            self._loop.call_soon_threadsafe(
                lambda: spawn("description of an expert replica", self._describe_again(replica_id))
            )

    def _keep(self, replicas: frozenset[str]) -> None:
        for keep in self._memories:
            keep(replicas)
        for memory in (self._answered_at, self._describe):
            for gone in memory.keys() - replicas:
                del memory[gone]

    def _holding_changed(self, replica_id: str) -> None:
        self._describe.pop(replica_id, None)
        self.breakers.succeeded(replica_id, time.monotonic())

    # The asyncio loop --------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        """Dials the replicas that the registry lists, and notes changes of what they hold and of their state."""
        while True:
            listed_now = self._watch.replicas
            listed = {replica.id: replica for replica in listed_now if replica.role is Role.EXPERT}
            changed = False  # one new table for all replicas that have followed a placement
            for replica in listed.values():
                if self._links.get(replica.id) is None:
                    if replica.state is not ReplicaState.STARTING:
                        self._links.want(replica)
                elif (known := self._holdings.get(replica.id)) is not None and _newer(replica, known):
                    holding = ReplicaHolding(replica.held, replica.leaving, replica.placement_epoch)
                    changed |= self._note(replica.id, holding)
            if changed:
                self._publish()
            self._note_listed(listed)
            with suppress(TimeoutError):
                async with asyncio.timeout(FOLLOW_S):
                    await self._watch.until(partial(ne, listed_now))

    def _note_listed(self, listed: Mapping[str, Replica]) -> None:
        sick = frozenset(replica.id for replica in listed.values() if replica.state is ReplicaState.SICK)
        if sick != self.breakers.sick:
            what = "replicas that report themselves sick, avoided where others hold their experts"
            _log.warning("%s: %s", what, ", ".join(sorted(sick)) or "none now")
            self.breakers.sick = sick
        self.breakers.draining = frozenset(one.id for one in listed.values() if one.state is ReplicaState.DRAINING)
        # Of a replica that answers, nothing is forgotten because the registry has lost it.
        if (known := listed.keys() | self._holdings.keys()) != self._known:
            self._known = frozenset(known)
            self._links.keep(self._known)
            self.mailbox.post(partial(self._keep, self._known))

    def _opened(self, replica: Replica, link: ExpertLink) -> None:
        self._deployments[replica.id] = replica.deployment
        if self._note(replica.id, link.holding):
            self._publish()

    def _lost(self, replica: Replica, _: ExpertLink) -> None:
        self._deployments.pop(replica.id, None)
        if self._release(replica.id):
            self._publish()
        self.mailbox.post(lambda: self.breakers.failed(replica.id, time.monotonic(), "its connection broke"))

    async def _describe_again(self, replica_id: str) -> None:
        if (link := self._links.get(replica_id)) is None:
            return
        try:
            await link.describe(HANDSHAKE_S)
        except MoietyError as error:
            _log.debug("replica %s did not answer which experts it holds: %s", replica_id, error)
            return
        if replica_id in self._holdings and self._note(replica_id, link.holding):
            self._publish()
            self.mailbox.post(partial(self._holding_changed, replica_id))

    def _note(self, replica_id: str, holding: ReplicaHolding) -> bool:
        """Notes what a replica holds. Returns whether that changed."""
        known, self._holdings[replica_id] = self._holdings.get(replica_id), holding
        return known != holding

    def _release(self, replica_id: str) -> bool:
        """Forgets what a replica holds, so that the next table leaves it out. Returns whether anything was known."""
        return self._holdings.pop(replica_id, None) is not None

    def _publish(self) -> None:
        version, current = self.table.version + 1, holders(self._holdings)
        if current.held != self._callable:
            self._callable = current.held
            self.table = HolderTable.build(version, current.held, self._shape.moe_layers, self._shape.experts)
        self.placement_epoch = current.epoch
        self.mailbox.post(lambda: _notify(self._table_listeners))


def _ignore(_: object) -> None:
    """Does nothing."""


def _notify(listeners: list[Callable[[], None]]) -> None:
    for listener in tuple(listeners):
        listener()


def _newer(listed: Replica, known: ReplicaHolding) -> bool:
    """Whether `listed`, a replica's entry in the registry, is newer than what the fleet knows of the replica.

    The fleet may have learned more from DescribeReplica. Within one epoch a replica only drops experts, so fewer
    leaving experts are newer.
    """
    fewer = len(listed.leaving) < len(known.leaving)
    return (listed.placement_epoch, fewer) > (known.epoch, False)
