"""The expert replicas a router can reach: follows the registry, keeps one link per replica, publishes the holder table.

Runs on the router's asyncio loop. The engine's thread owns the mailbox, calls `send`, handles the answers and
reads `table`. Each update replaces `table` by a new object.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from operator import ne

import numpy as np

from moiety.core.experts import ExpertSet, ModelShape
from moiety.core.replica import WIRE_VERSION, Replica, ReplicaState, Role, Transport
from moiety.core.system import SystemId
from moiety.errors import FailedPrecondition, InvalidRequest, MoietyError, PeerLost, ResourceExhausted
from moiety.internal.v1.experts_pb2 import OUTCOME_OVERLOADED, DescribeReplicaResponse, ForwardRequest, ForwardResponse
from moiety.policy.dispatch import HolderTable, ReplicaHolding, holders
from moiety.registry.watch import Watch
from moiety.wire.rows import RowBuffer, copy_rows
from moiety.wire.transports.connection import Answer, Reply
from moiety.wire.transports.expert_link import ExpertLink
from moiety.wire.transports.mailbox import Mailbox

_log = logging.getLogger(__name__)

HANDSHAKE_S = 2.0
REDIAL_S = 0.25  # a registered replica that does not answer is dialled again this often


class Fleet:
    """Live expert replicas of one system. A replica leaves the table the moment its connection breaks."""

    def __init__(
        self, watch: Watch, shape: ModelShape, system: SystemId, dtype: str, transport: Transport = Transport.AUTO
    ):
        self.mailbox = Mailbox()  # the engine thread's: receives answers and changes of the table
        self.table = HolderTable.build(0, {}, shape.moe_layers, shape.experts)
        # replica id -> experts that it may be called for; `table` was built from it.
        self._callable: Mapping[str, ExpertSet] = {}
        self._watch, self._shape, self._system, self._dtype = watch, shape, system, dtype
        self._transport = transport
        self._links: dict[str, ExpertLink] = {}
        self._holdings: dict[str, ReplicaHolding] = {}  # by replica id
        # Latest placement that `table` follows completely: no replica is called for an expert that it drops by it.
        self.placement_epoch = 0
        self._deployments: dict[str, str] = {}
        self._refused: dict[str, str] = {}  # replica id -> why, so that each reason is logged once
        self._listeners: list[Callable[[], None]] = []  # used by the engine's thread only
        self._dialling: dict[str, asyncio.Task[None]] = {}
        self._task: asyncio.Task[None] | None = None
        self.suspects: set[str] = set()  # replicas that a hedge overtook and that have not answered since
        self._unanswered: set[int] = set()  # ids of calls in flight, overtaken ones too; engine's thread only
        self._loop = asyncio.get_running_loop()
        self._call_ids = itertools.count(1)

    def start(self) -> None:
        self._task = asyncio.create_task(self._follow())

    async def close(self) -> None:
        tasks = [task for task in (self._task, *self._dialling.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(link.close() for link in self._links.values()))
        await asyncio.to_thread(self.mailbox.drain)

    def on_table_change(self, changed: Callable[[], None]) -> Callable[[], None]:
        """Registers `changed` to be called after `table` or `placement_epoch` is updated. Returns a function to unregister it.

        Both functions, and this method, run on the engine's thread.
        """
        self._listeners.append(changed)
        return partial(self._listeners.remove, changed)

    def next_call_id(self) -> int:
        """Returns an id that is unique among the calls of all lanes of this router."""
        return next(self._call_ids)

    def deployment_of(self, replica_id: str) -> str:
        return self._deployments.get(replica_id, "")

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
            self._unanswered.discard(call_id)
            if isinstance(result, Reply):
                self.suspects.discard(replica_id)
            answer(result)

        self._unanswered.add(call_id)
        buffer.send(on_answer)

    def suspect(self, replica_id: str, call_id: int) -> None:
        """Marks a replica as suspect, because a hedge of its call `call_id` was answered first.

        A suspect is called only for experts without another usable holder, until it answers any call. Has no effect if the
        replica has already answered `call_id`. Called by the engine's thread.
        """
        if call_id in self._unanswered:
            self.suspects.add(replica_id)

    def describe_again(self, replica_id: str) -> None:
        """Asks a replica again which experts it holds, after it answered NOT_HELD. From any thread."""
        asyncio.run_coroutine_threadsafe(self._describe_again(replica_id), self._loop)

    def reconnect(self, replica_id: str) -> None:
        """Closes the link to a replica that no longer answers calls; the fleet dials it again. From any thread."""
        if link := self._links.get(replica_id):
            asyncio.run_coroutine_threadsafe(link.close(), self._loop)

    async def _follow(self) -> None:
        """Dials the replicas that the registry lists, and notes changes of what they hold."""
        while True:
            listed_now = self._watch.replicas
            listed = {replica.id: replica for replica in listed_now if replica.role is Role.EXPERT}
            changed = False  # one new table for all replicas that have followed a placement
            for replica in listed.values():
                if replica.state is ReplicaState.READY and self._wanted(replica):
                    self._dialling[replica.id] = asyncio.create_task(self._serve(replica))
                    self._dialling[replica.id].add_done_callback(partial(self._forget, replica.id))
                elif (known := self._holdings.get(replica.id)) is not None and _newer(replica, known):
                    changed |= self._note(
                        replica.id, ReplicaHolding(replica.held, replica.leaving, replica.placement_epoch)
                    )
            for replica_id in [r for r, listed_one in listed.items() if listed_one.state is ReplicaState.DRAINING]:
                changed |= self._release(replica_id)  # no new calls; those in flight finish on its link
            if changed:
                self._publish()
            with suppress(TimeoutError):
                async with asyncio.timeout(REDIAL_S):
                    await self._watch.until(partial(ne, listed_now))

    def _wanted(self, replica: Replica) -> bool:
        if replica.id in self._dialling:
            return False
        if replica.wire_version == WIRE_VERSION:
            return True
        self._refuse(replica, f"its wire version is {replica.wire_version}, ours {WIRE_VERSION}")
        return False

    def _forget(self, replica_id: str, _: asyncio.Task[None]) -> None:
        del self._dialling[replica_id]

    async def _serve(self, replica: Replica) -> None:
        """Keeps the link to one replica from start to end: handshake, entry in the table, wait for its loss, removal."""
        try:
            link = await ExpertLink.open(replica.address, HANDSHAKE_S, self.mailbox, self._transport)
        except InvalidRequest as error:
            self._refuse(replica, f"its description is invalid: {error}")
            await asyncio.sleep(REDIAL_S)
            return
        except FailedPrecondition as error:
            self._refuse(replica, f"with the setting transport = {self._transport}, {error}")
            await asyncio.sleep(REDIAL_S)
            return
        except MoietyError as error:
            _log.debug("replica %s at %s does not answer yet: %s", replica.id, replica.address, error)
            await asyncio.sleep(REDIAL_S)
            return
        try:
            if problem := self._mismatch(link.description):
                self._refuse(replica, problem)
                await asyncio.sleep(REDIAL_S)
                return
            self._links[replica.id] = link
            self._deployments[replica.id] = replica.deployment
            if self._note(replica.id, link.holding):
                self._publish()
            _log.info(
                "replica %s (%s) at %s is connected over %s",
                replica.id,
                replica.deployment,
                replica.address,
                link.transport,
            )
            await link.connection.closed.wait()
            _log.warning("replica %s (%s) at %s is lost", replica.id, replica.deployment, replica.address)
        finally:
            self._links.pop(replica.id, None)
            self.suspects.discard(replica.id)
            self._deployments.pop(replica.id, None)
            if self._release(replica.id):
                self._publish()
            await link.close()

    def _mismatch(self, description: DescribeReplicaResponse) -> str:
        if description.wire_version != WIRE_VERSION:
            return f"its wire version is {description.wire_version}, ours {WIRE_VERSION}"
        if difference := self._system.difference(description.system):
            return difference
        if description.dtype != self._dtype or description.hidden != self._shape.mlp.hidden:
            rows = f"{description.hidden} x {description.dtype}"
            return f"its rows are {rows}, ours {self._shape.mlp.hidden} x {self._dtype}"
        return ""

    async def _describe_again(self, replica_id: str) -> None:
        if (link := self._links.get(replica_id)) is None:
            return
        try:
            await link.describe(HANDSHAKE_S)
        except MoietyError as error:
            _log.warning("replica %s did not answer which experts it holds: %s", replica_id, error)
            return
        if replica_id in self._holdings and self._note(replica_id, link.holding):
            self._publish()

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
        self.mailbox.post(self._notify_listeners)

    def _notify_listeners(self) -> None:
        for changed in tuple(self._listeners):
            changed()

    def _refuse(self, replica: Replica, why: str) -> None:
        if self._refused.get(replica.id) != why:
            self._refused[replica.id] = why
            _log.warning("replica %s (%s) is not used: %s", replica.id, replica.deployment, why)


def _newer(listed: Replica, known: ReplicaHolding) -> bool:
    """Whether `listed`, a replica's entry in the registry, is newer than what the fleet knows of the replica.

    The fleet may have learned more from DescribeReplica. Within one epoch a replica only drops experts, so fewer
    leaving experts are newer.
    """
    fewer = len(listed.leaving) < len(known.leaving)
    return (listed.placement_epoch, fewer) > (known.epoch, False)
