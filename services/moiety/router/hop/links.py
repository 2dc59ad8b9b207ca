"""Dials the expert replicas that the registry lists and keeps one link to each, on the router's asyncio loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from functools import partial

from moiety.core.experts import ModelShape
from moiety.core.replica import WIRE_VERSION, Replica, Transport
from moiety.core.supervise import spawn
from moiety.core.system import SystemId
from moiety.errors import FailedPrecondition, InvalidRequest, MoietyError
from moiety.internal.v1.experts_pb2 import DescribeReplicaResponse
from moiety.wire.transports.expert_link import ExpertLink
from moiety.wire.transports.mailbox import Mailbox

_log = logging.getLogger(__name__)

HANDSHAKE_S = 2.0
REDIAL_S = 0.25  # before a registered replica is dialled again; doubled while its links do not last
LONGEST_REDIAL_S = 2.0
LASTING_S = 10.0  # a link that has lasted this long is dialled again after REDIAL_S

Changed = Callable[[Replica, ExpertLink], None]


class Links:
    """The links of one router. `opened` and `lost` are called on the loop, `unasked` on the mailbox's thread."""

    def __init__(
        self,
        shape: ModelShape,
        system: SystemId,
        dtype: str,
        transport: Transport,
        mailbox: Mailbox,
        *,
        opened: Changed,
        lost: Changed,
        unasked: Callable[[str], None],
    ):
        """`unasked(replica id)`: the replica sent an answer that fits no open call."""
        self._shape, self._system, self._dtype, self._transport = shape, system, dtype, transport
        self._mailbox, self._opened, self._lost, self._unasked = mailbox, opened, lost, unasked
        self._links: dict[str, ExpertLink] = {}  # by replica id
        self._tasks: dict[str, asyncio.Task[None]] = {}  # one per replica that is linked, or dialled now and then
        self._redial_s: dict[str, float] = {}
        self._refused: dict[str, str] = {}  # replica id -> why, so that each reason is logged once

    def get(self, replica_id: str) -> ExpertLink | None:
        """Returns the open link to a replica. From any thread."""
        return self._links.get(replica_id)

    def want(self, replica: Replica) -> None:
        """Dials `replica` unless it is linked, being dialled, or was dialled a moment ago."""
        if replica.id in self._tasks:
            return
        if replica.wire_version != WIRE_VERSION:
            self._refuse(replica, f"its wire version is {replica.wire_version}, ours {WIRE_VERSION}")
            return
        self._tasks[replica.id] = task = spawn("link to an expert replica", self._keep_link(replica))
        task.add_done_callback(lambda _: self._tasks.pop(replica.id, None))

    def keep(self, replicas: Collection[str]) -> None:
        """Forgets what is remembered of all replicas but `replicas`. Their links end by themselves."""
        for memory in (self._refused, self._redial_s):
            for gone in memory.keys() - set(replicas):
                del memory[gone]

    async def close(self) -> None:
        """Closes all links; unanswered calls get PeerLost."""
        tasks = tuple(self._tasks.values())
        for task in tasks:
            task.cancel()  # it closes its link
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep_link(self, replica: Replica) -> None:
        """Keeps the link to one replica from start to end: handshake, wait for its loss, and a delay before the next one."""
        began = asyncio.get_running_loop().time()
        if (link := await self._open(replica)) is not None:
            self._links[replica.id] = link
            try:
                where = replica.id, replica.deployment, replica.address
                self._opened(replica, link)
                _log.info("replica %s (%s) at %s is connected over %s", *where, link.transport)
                await link.connection.closed.wait()
                _log.warning("replica %s (%s) at %s is lost", *where)
            finally:
                del self._links[replica.id]
                self._lost(replica, link)
                await link.close()
        lasted = asyncio.get_running_loop().time() - began >= LASTING_S
        delay_s = REDIAL_S if lasted else self._redial_s.get(replica.id, REDIAL_S)
        self._redial_s[replica.id] = min(2 * delay_s, LONGEST_REDIAL_S)
        await asyncio.sleep(delay_s)

    async def _open(self, replica: Replica) -> ExpertLink | None:
        """Dials `replica` and shakes hands. Returns None where it does not answer, or is refused."""
        unasked = partial(self._unasked, replica.id)
        try:
            link = await ExpertLink.open(
                replica.address, HANDSHAKE_S, self._mailbox, self._transport, self._shape, unasked
            )
        except InvalidRequest as error:
            self._refuse(replica, f"its description is invalid: {error}")
        except FailedPrecondition as error:
            self._refuse(replica, f"with the setting transport = {self._transport}, {error}")
        except MoietyError as error:
            _log.debug("replica %s at %s does not answer yet: %s", replica.id, replica.address, error)
        else:
            if not (problem := self._mismatch(link.description)):
                return link
            self._refuse(replica, problem)
            await link.close()
        return None

    def _mismatch(self, description: DescribeReplicaResponse) -> str:
        if description.wire_version != WIRE_VERSION:
            return f"its wire version is {description.wire_version}, ours {WIRE_VERSION}"
        if difference := self._system.difference(description.system):
            return difference
        if description.dtype != self._dtype or description.hidden != self._shape.mlp.hidden:
            rows = f"{description.hidden} x {description.dtype}"
            return f"its rows are {rows}, ours {self._shape.mlp.hidden} x {self._dtype}"
        return ""

    def _refuse(self, replica: Replica, why: str) -> None:
        if self._refused.get(replica.id) != why:
            self._refused[replica.id] = why
            _log.warning("replica %s (%s) is not used: %s", replica.id, replica.deployment, why)
