"""How long a call may take before the router does something about it.

The limit follows what the call is expected to take: the fitted cost of its kind of replica, and the queue and batch that the
replica reported last. There is no constant after which a working replica counts as broken.
"""

from __future__ import annotations

from collections.abc import Collection

from moiety.internal.v1.experts_pb2 import ForwardResponse
from moiety.router.hop.cost_fit import CostFit

FLOOR_S = 1.0  # covers warm-up, other routers' batches, and a process that was not scheduled for a while
FACTOR = 4.0  # times the expected seconds


class CallLimits:
    """The limits of the calls of one router. Used by the engine's thread only."""

    def __init__(self, costs: CostFit, experts: int) -> None:
        """`experts`: per layer of the model."""
        self._costs, self._experts = costs, experts
        self._latest_s: dict[str, float] = {}  # replica -> seconds in queue and batch, by its last reply

    def record(self, replica: str, reply: ForwardResponse, took_s: float) -> None:
        """Notes how long a replica said it took for a call that was answered after `took_s` seconds."""
        said_s = (reply.queue_ms + reply.compute_ms) / 1000
        self._latest_s[replica] = said_s if 0.0 <= said_s <= took_s else took_s

    def of(self, replica: str, kind: str, rows: int) -> float:
        """Returns the seconds after which a call of `rows` (token, expert) pairs to `replica` is late."""
        expected_s = self._costs.predict(kind, min(rows, self._experts), rows) + self._latest_s.get(replica, 0.0)
        return max(FLOOR_S, FACTOR * expected_s)

    def keep(self, replicas: Collection[str]) -> None:
        """Forgets all replicas but `replicas`."""
        self._latest_s = {replica: seconds for replica, seconds in self._latest_s.items() if replica in replicas}
