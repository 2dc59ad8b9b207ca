"""The expert replicas a router can reach: follows the registry, keeps one open stream each, and publishes the table.

Runs on the router's asyncio loop. The engine's thread only reads `table` (replaced whole, never changed) and `send`s.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from operator import ne

from moiety.core import WIRE_VERSION, ExpertSet, ModelShape, Replica, ReplicaState, Role
from moiety.errors import InvalidRequest, MoietyError, PeerLost
from moiety.load.watch import Watch
from moiety.policy.dispatch import Table
from moiety.wire.codec import Rows
from moiety.wire.expert_stream import Answer, ExpertStream, Reply
from moiety.wire.experts_pb2 import DescribeResponse, ForwardRequest

_log = logging.getLogger(__name__)

HANDSHAKE_S = 2.0
REDIAL_S = 0.25  # a registered replica that does not answer is dialled again this often


class Fleet:
    """Live expert replicas of one revision. A replica leaves the table the moment its stream breaks."""

    def __init__(self, watch: Watch, shape: ModelShape, revision: str, dtype: str):
        self.table = Table.build(0, {}, shape.moe_layers, shape.experts)
        self._watch, self._shape, self._revision, self._dtype = watch, shape, revision, dtype
        self._streams: dict[str, ExpertStream] = {}
        self._held: dict[str, ExpertSet] = {}
        self._epochs: dict[str, int] = {}  # placement epoch that `_held` is of
        self._deployments: dict[str, str] = {}
        self._refused: dict[str, str] = {}  # replica id -> why, so that it is told once
        self._listeners: list[Callable[[], None]] = []
        self._listeners_lock = threading.Lock()
        self._dialling: dict[str, asyncio.Task[None]] = {}
        self._task: asyncio.Task[None] | None = None
        self.suspects: set[str] = set()  # replicas that a hedge overtook and that have not answered since
        self._unanswered: set[int] = set()  # ids of calls in flight, overtaken ones too
        self._answers_lock = threading.Lock()  # of the two above: calls are sent and answered on different threads
        self._loop = asyncio.get_running_loop()
        self._call_ids = itertools.count(1)

    def start(self) -> None:
        self._task = asyncio.create_task(self._follow())

    async def close(self) -> None:
        tasks = [task for task in (self._task, *self._dialling.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(stream.close() for stream in self._streams.values()))

    def listen(self, changed: Callable[[], None]) -> Callable[[], None]:
        """Calls `changed` (from the loop) after every new table, until the returned function is called. Any thread."""
        with self._listeners_lock:
            self._listeners.append(changed)

        def stop() -> None:
            with self._listeners_lock:
                self._listeners.remove(changed)

        return stop

    def next_call_id(self) -> int:
        """Unique among all calls of this router, whichever lane asks."""
        return next(self._call_ids)

    def deployment_of(self, replica_id: str) -> str:
        return self._deployments.get(replica_id, "")

    def send(self, replica_id: str, header: ForwardRequest, payload: Rows, answer: Answer) -> None:
        """Sends one call, from any thread; a replica that has just left answers PeerLost like any other loss."""
        call_id = header.call_id
        if (stream := self._streams.get(replica_id)) is None:
            answer(PeerLost(f"replica {replica_id} has left"))
            return

        def heard(result: Reply | PeerLost) -> None:
            with self._answers_lock:
                self._unanswered.discard(call_id)
                if isinstance(result, Reply):
                    self.suspects.discard(replica_id)
            answer(result)

        with self._answers_lock:
            self._unanswered.add(call_id)
        stream.send(header, payload, heard)

    def suspect(self, replica_id: str, call_id: int) -> None:
        """A hedge overtook this call: its replica is avoided until it answers, unless it just has. From any thread."""
        with self._answers_lock:
            if call_id in self._unanswered:
                self.suspects.add(replica_id)

    def refresh(self, replica_id: str) -> None:
        """Asks a replica again what it holds, after it answered NOT_HELD. From any thread."""
        asyncio.run_coroutine_threadsafe(self._describe_again(replica_id), self._loop)

    def give_up(self, replica_id: str) -> None:
        """Breaks the stream of a replica that no longer answers calls; it is dialled again. From any thread."""
        if stream := self._streams.get(replica_id):
            asyncio.run_coroutine_threadsafe(stream.close(), self._loop)

    async def _follow(self) -> None:
        """Dials what the registry lists and forgets what both the registry and its stream have given up."""
        while True:
            listed_now = self._watch.replicas
            listed = {replica.id: replica for replica in listed_now if replica.role is Role.EXPERT}
            for replica in listed.values():
                if replica.state is ReplicaState.READY and self._wanted(replica):
                    self._dialling[replica.id] = asyncio.create_task(self._serve(replica))
                    self._dialling[replica.id].add_done_callback(partial(self._forget, replica.id))
                elif replica.id in self._held and replica.placement_epoch > self._epochs[replica.id]:
                    self._hold(replica.id, replica.held, replica.placement_epoch)
            for replica_id in [r for r, listed_one in listed.items() if listed_one.state is ReplicaState.DRAINING]:
                if self._held.pop(replica_id, None) is not None:  # no new calls; those in flight finish on its stream
                    self._publish()
            with suppress(TimeoutError):
                async with asyncio.timeout(REDIAL_S):
                    await self._watch.until(partial(ne, listed_now))

    def _wanted(self, replica: Replica) -> bool:
        if replica.id in self._dialling:
            return False
        if replica.revision == self._revision and replica.wire_version == WIRE_VERSION:
            return True
        self._refuse(replica, f"it serves revision {replica.revision}, wire version {replica.wire_version}")
        return False

    def _forget(self, replica_id: str, _: asyncio.Task[None]) -> None:
        del self._dialling[replica_id]

    async def _serve(self, replica: Replica) -> None:
        """One replica's whole life here: handshake, in the table, gone."""
        try:
            stream = await ExpertStream.open(replica.address, HANDSHAKE_S)
        except InvalidRequest as error:
            self._refuse(replica, f"its Describe cannot be read: {error}")
            await asyncio.sleep(REDIAL_S)
            return
        except MoietyError as error:
            _log.debug("replica %s at %s does not answer yet: %s", replica.id, replica.address, error)
            await asyncio.sleep(REDIAL_S)
            return
        try:
            if problem := self._mismatch(stream.description):
                self._refuse(replica, problem)
                await asyncio.sleep(REDIAL_S)
                return
            self._streams[replica.id] = stream
            self._deployments[replica.id] = replica.deployment
            self._hold(replica.id, stream.held, stream.description.placement_epoch)
            _log.info("replica %s (%s) at %s is in", replica.id, replica.deployment, replica.address)
            await stream.closed.wait()
            _log.warning("replica %s (%s) at %s is lost", replica.id, replica.deployment, replica.address)
        finally:
            self._streams.pop(replica.id, None)
            self.suspects.discard(replica.id)
            self._deployments.pop(replica.id, None)
            self._epochs.pop(replica.id, None)
            if self._held.pop(replica.id, None) is not None:
                self._publish()
            await stream.close()

    def _mismatch(self, told: DescribeResponse) -> str:
        if told.revision != self._revision:
            return f"it serves revision {told.revision}"
        if told.dtype != self._dtype or told.hidden != self._shape.mlp.hidden:
            return f"its rows are {told.hidden} x {told.dtype}, ours {self._shape.mlp.hidden} x {self._dtype}"
        return ""

    async def _describe_again(self, replica_id: str) -> None:
        if (stream := self._streams.get(replica_id)) is None:
            return
        try:
            await stream.describe(HANDSHAKE_S)
        except MoietyError as error:
            _log.warning("replica %s does not say what it holds: %s", replica_id, error)
            return
        if replica_id in self._held:
            self._hold(replica_id, stream.held, stream.description.placement_epoch)

    def _hold(self, replica_id: str, held: ExpertSet, epoch: int) -> None:
        """Notes what a replica holds. The registry may lag behind what Describe told; the epoch says which is newer."""
        changed = self._held.get(replica_id) != held
        self._held[replica_id], self._epochs[replica_id] = held, epoch
        if changed:
            self._publish()

    def _publish(self) -> None:
        version = self.table.version + 1
        self.table = Table.build(version, dict(self._held), self._shape.moe_layers, self._shape.experts)
        with self._listeners_lock:
            listeners: Sequence[Callable[[], None]] = tuple(self._listeners)
        for changed in listeners:
            changed()

    def _refuse(self, replica: Replica, why: str) -> None:
        if self._refused.get(replica.id) != why:
            self._refused[replica.id] = why
            _log.warning(
                "replica %s (%s) is left out: %s; ours is %s", replica.id, replica.deployment, why, self._revision
            )
