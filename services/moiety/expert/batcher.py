"""The bounded queue between RPC and device. It merges waiting calls of all routers for the same layer into one batch."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from moiety.core.expert_backend import CallClass
from moiety.errors import ResourceExhausted
from moiety.wire.frames import ForwardCall
from moiety.wire.rows import SelectedRows
from moiety.wire.transports.mailbox import Mailbox

PREFILL_PATIENCE_S = 0.5  # decode goes before a prefill call until it has waited this long: no call is starved
MAX_BATCH_ROWS = 4096  # assignments merged into one batch; bounds the device's scratch memory


@dataclass(frozen=True, slots=True)
class Computed:
    """The result of one call: its output rows, and how its batch ran on the device."""

    picked: SelectedRows  # [A], unweighted expert outputs in the order of the call's experts, not copied yet
    activated_experts: int
    batch_rows: int
    queue_ms: float
    compute_ms: float
    started_ns: int  # Unix time at which the device began
    ended_ns: int  # Unix time at which it was done


@dataclass(slots=True, eq=False)
class QueuedCall:
    """A queued call. `done` receives its result, once: on the runtime's thread, or if it is cancelled, on the canceller's."""

    call: ForwardCall
    done: Callable[[Computed | BaseException], None]
    since: float = field(default_factory=time.monotonic)
    since_ns: int = field(default_factory=time.time_ns)
    origin: object = None  # the connection that it came through: call ids are unique there
    checked: object = None  # the runtime's Holding that was found to have all experts of the call


class Batcher:
    """Holds one queue per (call class, layer), from which `take` forms a batch: decode before prefill, oldest first.

    A prefill call that has waited PREFILL_PATIENCE_S goes before younger decode calls. `put` and `close` may be called from
    any thread. The thread that calls `take` owns `mailbox` and reads there the calls that routers on this node send through
    shared memory.
    """

    def __init__(self, limit: int):
        self.mailbox = Mailbox()
        self._limit = limit
        self._queues: dict[tuple[CallClass, int], deque[QueuedCall]] = {}
        self._size = 0
        self._closed = False
        self._lock = threading.Lock()

    def put(self, waiting: QueuedCall) -> None:
        """Queues a call. Raises ResourceExhausted when `limit` calls already wait, and after `close`."""
        with self._lock:
            if self._closed:
                raise ResourceExhausted("this replica is shutting down", 0.05)
            if self._size >= self._limit:
                raise ResourceExhausted(f"{self._size} of at most {self._limit} calls wait for the device", 0.05)
            key = (waiting.call.call_class, waiting.call.layer)
            self._queues.setdefault(key, deque()).append(waiting)
            self._size += 1
        self.mailbox.wake()

    def take(self) -> list[QueuedCall]:
        """Waits for calls and returns the next batch; an empty list once closed and out of calls.

        A batch has at most MAX_BATCH_ROWS assignments, or is a single larger call.
        """
        more = True  # read on while sockets have more: every call that has arrived by now may join the batch
        while more or not (self._size or self._closed):
            more = self.mailbox.wait(0.0 if self._size or self._closed else None)
        with self._lock:
            if not self._size:
                return []
            patient_until = time.monotonic() - PREFILL_PATIENCE_S
            key = min(self._queues, key=lambda queue_key: self._urgency(queue_key, patient_until))
            queue, rows = self._queues[key], 0
            batch: list[QueuedCall] = []
            while queue and (not batch or rows + len(queue[0].call.experts) <= MAX_BATCH_ROWS):
                rows += len(queue[0].call.experts)
                batch.append(queue.popleft())
            if not queue:
                del self._queues[key]
            self._size -= len(batch)
            return batch

    def remove(self, origin: object, call_id: int, attempt: int) -> QueuedCall | None:
        """Takes one call out of its queue. Returns None if it does not wait here. May be called from any thread."""
        with self._lock:
            for key, queue in self._queues.items():
                for waiting in queue:
                    if (waiting.call.call_id, waiting.call.attempt, waiting.origin) == (call_id, attempt, origin):
                        queue.remove(waiting)
                        if not queue:
                            del self._queues[key]
                        self._size -= 1
                        return waiting
        return None

    def _urgency(self, key: tuple[CallClass, int], patient_until: float) -> tuple[bool, float]:
        """Returns the sort key of a queue; the queue with the smallest key is taken first.

        A prefill queue whose oldest call was queued after `patient_until` comes after all other queues. Among equals, the
        queue with the oldest call comes first.
        """
        since = self._queues[key][0].since
        return key[0] is CallClass.PREFILL and since > patient_until, since

    def close(self) -> None:
        """Refuses further calls; `take` returns the calls that are left, then empty batches."""
        with self._lock:
            self._closed = True
        self.mailbox.wake()

    def __len__(self) -> int:
        return self._size
