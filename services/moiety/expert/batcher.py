"""The waiting room between RPC and device: bounded, and merging calls of all routers that wait for the same layer."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from moiety.core.expert_backend import CallClass
from moiety.errors import ResourceExhausted
from moiety.wire.codec import Picked
from moiety.wire.frames import ForwardCall
from moiety.wire.transports.mailbox import Mailbox

PREFILL_PATIENCE_S = 0.5  # prefill gives way to decode for this long, so that a busy replica never starves it
MAX_BATCH_ROWS = 4096  # assignments merged into one batch; bounds the device's scratch memory


@dataclass(frozen=True, slots=True)
class Computed:
    """What the runtime did for one call."""

    picked: Picked  # [A], unweighted expert outputs in the order of the call's experts, where they lie
    activated_experts: int
    batch_rows: int
    queue_ms: float
    compute_ms: float
    started_ns: int  # Unix time at which the device began
    ended_ns: int


@dataclass(slots=True, eq=False)
class Waiting:
    """A call in the queue, and whom to tell: `done` is called once, from the runtime's thread."""

    call: ForwardCall
    done: Callable[[Computed | BaseException], None]
    since: float = field(default_factory=time.monotonic)
    since_ns: int = field(default_factory=time.time_ns)
    checked: object = None  # what the runtime held when it found that it holds all that the call asks for


class Batcher:
    """Per (class, layer) queues. `take` gives all that wait for one layer: decode before prefill, oldest first.

    `put` and `close` may be called from any thread. Whoever takes owns the mailbox, and finds there what else may bring
    calls: the doorbells of routers in shared memory.
    """

    def __init__(self, limit: int):
        self.mailbox = Mailbox()
        self._limit = limit
        self._queues: dict[tuple[CallClass, int], deque[Waiting]] = {}
        self._size = 0
        self._closed = False
        self._lock = threading.Lock()

    def put(self, waiting: Waiting) -> None:
        """Raises ResourceExhausted when `limit` calls already wait, and after `close`."""
        with self._lock:
            if self._closed:
                raise ResourceExhausted("this replica is shutting down", 0.05)
            if self._size >= self._limit:
                raise ResourceExhausted(f"{self._size} of at most {self._limit} calls wait for the device", 0.05)
            key = (waiting.call.call_class, waiting.call.layer)
            self._queues.setdefault(key, deque()).append(waiting)
            self._size += 1
        self.mailbox.wake()

    def take(self) -> list[Waiting]:
        """Blocks for the next batch; empty when the batcher was closed and drained."""
        more = True  # all calls that have come by now may join the batch
        while more or not (self._size or self._closed):
            more = self.mailbox.wait(0.0 if self._size or self._closed else None)
        with self._lock:
            if not self._size:
                return []
            patient_until = time.monotonic() - PREFILL_PATIENCE_S
            key = min(self._queues, key=lambda each: self._urgency(each, patient_until))
            queue, rows = self._queues[key], 0
            batch: list[Waiting] = []
            while queue and (not batch or rows + len(queue[0].call.experts) <= MAX_BATCH_ROWS):
                rows += len(queue[0].call.experts)
                batch.append(queue.popleft())
            if not queue:
                del self._queues[key]
            self._size -= len(batch)
            return batch

    def _urgency(self, key: tuple[CallClass, int], patient_until: float) -> tuple[bool, float]:
        """Smallest first: decode, and prefill that has waited long enough, then by age."""
        since = self._queues[key][0].since
        return key[0] is CallClass.PREFILL and since > patient_until, since

    def close(self) -> None:
        """No more puts; `take` hands out what is left, then nothing."""
        with self._lock:
            self._closed = True
        self.mailbox.wake()

    def __len__(self) -> int:
        return self._size
