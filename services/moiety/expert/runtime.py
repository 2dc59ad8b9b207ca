"""The device thread, which computes batch after batch, and the experts' weights that it uses."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

import numpy as np
import torch

from moiety.core.experts import ExpertMLP, ExpertSet
from moiety.core.load import ReplicaLoad
from moiety.core.progress import Progress
from moiety.core.supervise import supervise_thread
from moiety.errors import Cancelled, DeadlineExceeded, MoietyError, Unavailable
from moiety.expert.batcher import Batcher, Computed, QueuedCall
from moiety.expert.device import Device
from moiety.expert.holding import Holding
from moiety.expert.load_window import LoadWindow
from moiety.wire.rows import RowBuffer, SelectedRows, copy_rows
from moiety.wire.transports.mailbox import Mailbox
from moiety_kernels.weights.expert_table import ExpertTable
from moiety_kernels.weights.expert_weights import ExpertWeights

_log = logging.getLogger(__name__)
NO_EXPERTS = ExpertTable({})  # of a layer of which this replica holds none
_SEE_LOG = "the expert computation failed; the replica's log says why"
MOST_FAILURES = 2  # a batch, and then the device's probe
LEAST_S = 5.0  # a batch may always take this long


class Runtime:
    """Computes calls on one device. A failing batch fails its own calls only; the thread goes on.

    `load(experts)` reads the weights of new experts. It runs on the thread that calls `hold`, so the device thread keeps
    serving meanwhile. `capacity`: most rows per second that the device computes, for tests and demos whose replicas share
    two cores. `deterministic`: the bits of a row do not depend on the batch that computes it. `wire_dtype`: in which rows
    arrive and return, by default `dtype`, that of the weights. float32 for slices of experts, whose results are summed.
    """

    def __init__(
        self,
        mlp: ExpertMLP,
        dtype: torch.dtype,
        device: str,
        load: Callable[[ExpertSet], Mapping[tuple[int, int], ExpertWeights]],
        *,
        queue_calls: int,
        capacity: float | None = None,
        threads: int = 1,
        deterministic: bool = False,
        wire_dtype: torch.dtype | None = None,
    ):
        self.capacity = capacity
        self.device = Device(mlp, dtype, device, wire_dtype=wire_dtype or dtype, deterministic=deterministic)
        self._load, self._threads = load, threads
        self._progress = Progress(MOST_FAILURES, LEAST_S)
        self._suspect: tuple[ExpertTable, list[int]] = NO_EXPERTS, []  # weights of the batch that failed last
        self._recheck_posted = False
        self._holding = Holding(ExpertSet(), ExpertSet(), 0, {})
        self._loading = threading.Lock()
        self._batcher = Batcher(queue_calls)
        self._unanswered: set[QueuedCall] = set()
        self._unanswered_lock = threading.Lock()
        self._computed_at = 0.0  # monotonic clock, in seconds, when the last batch was done
        self.accepted = 0  # calls since the start
        self.served = 0.0  # Unix seconds at which the first rows were computed; 0 = none yet
        self._window = LoadWindow()
        self._thread = supervise_thread("expert-runtime", self._run)

    @property
    def holding(self) -> Holding:
        """The experts held now, with their weights, as one consistent value."""
        return self._holding

    def hold(self, held: ExpertSet, epoch: int) -> None:
        """Loads the experts of `held` that are missing, layer by layer, and then adopts the placement of `epoch`.

        Experts that are not in `held` become `leaving` and stay loaded. Blocks while the weights are read. If reading fails,
        the Holding stays as it was.
        """
        with self._loading:
            current = self._holding
            loaded, layers = current.held | current.leaving, dict(current.layers)
            for layer, ids in (held - loaded).by_layer.items():
                new = {expert: weights for (_, expert), weights in self._load(ExpertSet({layer: ids})).items()}
                layers[layer] = ExpertTable({**layers[layer].experts, **new} if layer in layers else new)
            self._holding = Holding(held, loaded - held, epoch, layers)

    def drop_leaving(self) -> bool:
        """Frees the weights of the leaving experts. Returns False and frees none while an unanswered call needs one of them."""
        with self._loading:
            current = self._holding
            with self._unanswered_lock:
                calls = [waiting.call for waiting in self._unanswered]
            if any(not current.leaving.layer(call.layer).isdisjoint(call.experts.tolist()) for call in calls):
                return False
            kept = {
                layer: ExpertTable({expert: current.layers[layer].experts[expert] for expert in ids})
                if layer in current.leaving.by_layer
                else current.layers[layer]
                for layer, ids in current.held.by_layer.items()
            }
            self._holding = Holding(current.held, ExpertSet(), current.epoch, kept)
            return True

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Refuses new calls, computes the queued ones and ends the thread. Waits at most `timeout_s` seconds for its end.

        Does not wait for a device that hangs.
        """
        self._batcher.close()
        if not self._progress.problem(time.monotonic()):
            self._thread.join(timeout_s)

    @property
    def mailbox(self) -> Mailbox:
        """The mailbox on which the device thread waits. There it also reads the calls that come through shared memory."""
        return self._batcher.mailbox

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def check_health(self) -> None:
        """Raises Unavailable if the device hangs or fails, or its thread has ended. From any thread, about once a second.

        A device that failed its last batch is probed again, so that it recovers, or turns out to be sick, without calls.
        """
        if not self.alive:
            raise Unavailable("the expert runtime's thread has ended")
        if self._progress.failures and not self._recheck_posted:
            self._recheck_posted = True
            self.mailbox.post(self._recheck)
        if problem := self._progress.problem(time.monotonic()):
            raise Unavailable(f"the device is sick: {problem}")

    @property
    def idle(self) -> bool:
        """Whether every accepted call has been answered."""
        return not self._unanswered

    def submit(self, waiting: QueuedCall) -> None:
        """Queues a call. Raises NotHeld if the replica lacks one of the call's experts.

        Raises ResourceExhausted if the queue is full or the replica is shutting down.
        """
        if 0.0 < waiting.call.sent < self._computed_at:
            # It arrived while the device was busy: the computing thread reads shared memory between batches only.
            waiting.since_ns -= int(1e9 * (waiting.since - waiting.call.sent))
            waiting.since = waiting.call.sent
        holding = self._holding
        holding.check(waiting.call)
        waiting.checked = holding
        with self._unanswered_lock:
            self._unanswered.add(waiting)
            self.accepted += 1
        try:
            self._batcher.put(waiting)
        except BaseException:
            self._answered(waiting)
            raise

    def cancel(self, origin: object, call_id: int, attempt: int) -> None:
        """Answers a call that came through `origin` with Cancelled, unless the device has begun it. From any thread."""
        if (waiting := self._batcher.remove(origin, call_id, attempt)) is not None:
            self._answer(waiting, Cancelled("the router no longer needs the call"))

    def load_since_last(self) -> ReplicaLoad:
        """Returns the replica's load since the previous call of this method: busy fraction, queue wait and rates."""
        return self._window.read()

    @torch.inference_mode()
    def _run(self) -> None:
        _let_callers_finish()
        torch.set_num_threads(self._threads)
        while batch := self._batcher.take():
            holding = self._holding  # one for the whole batch: `hold` may replace it meanwhile
            ready = [waiting for waiting in batch if self._admit(waiting, holding)]
            if not ready:
                continue
            table = holding.layers.get(ready[0].call.layer, NO_EXPERTS)
            try:
                results = self._compute(ready, table)
            except Exception as error:
                if self._progress.fail(time.monotonic()):
                    _log.exception("a batch of %d calls for layer %d failed", len(ready), ready[0].call.layer)
                ours = error if isinstance(error, MoietyError) else MoietyError(_SEE_LOG)
                for waiting in ready:
                    self._answer(waiting, ours)
                self._suspect = table, np.unique(ready[0].call.experts).tolist()
                self._probe()
                continue
            for waiting, result in zip(ready, results, strict=True):
                self._answer(waiting, result)

    def _probe(self) -> None:
        """Finds out whether the device or the rows of the failed batch are to blame: a sick device fails zeros, too."""
        table, experts = self._suspect
        self._progress.begin(time.monotonic())
        try:
            self.device.probe(table.select(experts))
        except Exception:
            self._progress.fail(time.monotonic())
        else:
            self._progress.end(time.monotonic())
            self._suspect = NO_EXPERTS, []  # a placement may take these experts away

    def _recheck(self) -> None:
        self._recheck_posted = False
        if self._progress.failures:
            self._probe()

    def _answer(self, waiting: QueuedCall, result: Computed | BaseException) -> None:
        """Passes a result to a call's `done`. Logs an exception of `done`: a lost caller must not stop the other calls."""
        try:
            waiting.done(result)
        except Exception:
            _log.exception("the answer to a call for layer %d could not be delivered", waiting.call.layer)
        finally:
            self._answered(waiting)

    def _answered(self, waiting: QueuedCall) -> None:
        with self._unanswered_lock:
            self._unanswered.discard(waiting)

    def _admit(self, waiting: QueuedCall, holding: Holding) -> bool:
        """Returns whether a call can still be computed with `holding`; if not, answers it with NotHeld or DeadlineExceeded."""
        try:
            if waiting.checked is not holding:
                holding.check(waiting.call)
            if waiting.call.deadline.passed:
                waited_s = time.monotonic() - waiting.since
                raise DeadlineExceeded(f"the deadline passed while the call waited {waited_s:.3f} s for the device")
        except MoietyError as error:
            self._answer(waiting, error)
            return False
        return True

    def _compute(self, batch: list[QueuedCall], weights: ExpertTable) -> list[Computed]:
        """Gathers the rows of all calls, sorted by expert, and computes them. A result's rows are in the order of its call."""
        began, began_ns = time.monotonic(), time.time_ns()
        experts = np.concatenate([waiting.call.experts for waiting in batch])  # [A]
        self._progress.begin(began, len(experts))
        order = np.argsort(experts, kind="stable")
        counts = np.bincount(experts)  # takes a tenth of np.unique's time for the few rows of a decode step
        activated = counts.nonzero()[0]
        rows = self.device.empty(len(experts))
        into, start = RowBuffer.of(rows), 0
        places: list[np.ndarray] = []  # of each call
        position = np.empty_like(order)
        position[order] = np.arange(len(order))  # where each assignment lies in expert order
        for waiting in batch:
            end = start + len(waiting.call.experts)
            places.append(position[start:end])
            copy_rows(waiting.call.payload, into, chosen=waiting.call.row_of, places=places[-1])
            start = end
        computed = self.device.compute(rows, counts[activated].tolist(), weights.select(activated.tolist()))
        self._progress.end(time.monotonic())
        if self.capacity is not None:
            time.sleep(max(0.0, began + len(experts) / self.capacity - time.monotonic()))
        ended, ended_ns = time.monotonic(), time.time_ns()
        self.served = self.served or ended_ns / 1e9
        self._computed_at = ended
        self._window.add(ended - began, sum(began - waiting.since for waiting in batch), len(experts), len(batch))
        return [
            Computed(
                picked=SelectedRows(computed, picked),
                activated_experts=len(activated),
                batch_rows=len(experts),
                queue_ms=1000 * (began - waiting.since),
                compute_ms=1000 * (ended - began),
                started_ns=began_ns,
                ended_ns=ended_ns,
            )
            for waiting, picked in zip(batch, places, strict=True)
        ]


def _let_callers_finish() -> None:
    """Keeps this thread, and threads that it starts, from preempting the thread that wakes them (SCHED_BATCH, on Linux).

    A router sends its calls to one replica after the other. If the first replica shares the router's core, it would
    otherwise compute its call before the router sends the next one. The replicas would then work in turn, not in parallel.
    """
    if hasattr(os, "SCHED_BATCH"):
        with suppress(OSError):  # a sandbox may forbid it: slower, but not wrong
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
