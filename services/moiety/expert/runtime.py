"""The device room: one thread owns the experts' weights and computes batch after batch."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from moiety.core import Busy, ExpertMLP, ExpertSet
from moiety.errors import DeadlineExceeded, MoietyError, NotHeld
from moiety.expert.batcher import Batcher, Computed, Waiting
from moiety.wire import codec
from moiety_kernels.expert_mlp import ExpertWeights, grouped_expert_mlp

_log = logging.getLogger(__name__)

Weights = Mapping[tuple[int, int], ExpertWeights]


@dataclass(slots=True)
class _Window:
    since: float
    busy_s: float = 0.0
    wait_s: float = 0.0
    rows: int = 0
    calls: int = 0


class Runtime:
    """Computes calls on one device. A failing batch fails its own calls, never the loop.

    `load(held)` reads weights; it runs in the caller's thread, so that serving goes on while new experts are read.
    `capacity` paces the device to that many rows per second: for tests and demos whose replicas share two cores.
    """

    def __init__(
        self,
        mlp: ExpertMLP,
        dtype: torch.dtype,
        device: str,
        load: Callable[[ExpertSet], Weights],
        *,
        queue_calls: int,
        capacity: float | None = None,
        threads: int = 1,
    ):
        self.capacity = capacity
        self.held = ExpertSet()
        self.epoch = 0
        self._mlp, self._dtype, self._device, self._load, self._threads = (
            mlp,
            dtype,
            torch.device(device),
            load,
            threads,
        )
        self._weights: Weights = {}
        self._batcher = Batcher(queue_calls)
        self._holding = threading.Lock()
        self._computing = False
        self._window = _Window(time.monotonic())
        self._window_lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="expert-runtime", daemon=True)

    def hold(self, held: ExpertSet, epoch: int) -> None:
        """Loads what is new beside what is there, then drops what is no longer `held`. Blocks for the reading."""
        with self._holding:
            new = ExpertSet(
                {
                    layer: ids - self.held.layer(layer)
                    for layer, ids in held.by_layer.items()
                    if ids - self.held.layer(layer)
                }
            )
            loaded = {**self._weights, **self._load(new)}
            self._weights = {pair: weights for pair, weights in loaded.items() if pair in held}
            self.held, self.epoch = held, epoch

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Finishes what is queued, then ends the thread."""
        self._batcher.close()
        self._thread.join(timeout_s)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def idle(self) -> bool:
        """No call waits or is being computed."""
        return not len(self._batcher) and not self._computing

    def submit(self, waiting: Waiting) -> None:
        """Queues a call. Raises NotHeld or ResourceExhausted; nothing of the call is computed then."""
        self._check_held(waiting)
        self._batcher.put(waiting)

    def load_since_last(self) -> Busy:
        """The load since this was last asked for."""
        now = time.monotonic()
        with self._window_lock:
            window, self._window = self._window, _Window(now)
        span = max(now - window.since, 1e-6)
        return Busy(
            busy=min(1.0, window.busy_s / span),
            queue_wait_ms=1000 * window.wait_s / max(window.calls, 1),
            rows_per_s=window.rows / span,
            calls_per_s=window.calls / span,
        )

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        while batch := self._batcher.take():
            ready = [waiting for waiting in batch if self._admit(waiting)]
            if not ready:
                continue
            self._computing = True
            try:
                results = self._compute(ready)
            except Exception as error:
                _log.exception("a batch of %d calls for layer %d failed", len(ready), ready[0].call.layer)
                for waiting in ready:
                    waiting.done(MoietyError(f"the expert computation failed: {type(error).__name__}: {error}"))
                continue
            finally:
                self._computing = False
            for waiting, result in zip(ready, results, strict=True):
                waiting.done(result)

    def _admit(self, waiting: Waiting) -> bool:
        """Whether the call may go to the device; tells its caller when not."""
        try:
            self._check_held(waiting)
            if waiting.call.deadline.passed:
                raise DeadlineExceeded(f"the call waited {time.monotonic() - waiting.since:.3f} s for the device")
        except MoietyError as error:
            waiting.done(error)
            return False
        return True

    def _check_held(self, waiting: Waiting) -> None:
        held = self.held.layer(waiting.call.layer)
        missing = sorted(set(waiting.call.experts.tolist()) - held)
        if missing:
            raise NotHeld(f"layer {waiting.call.layer}: expert(s) {missing} are not held here (epoch {self.epoch})")

    @torch.inference_mode()
    def _compute(self, batch: list[Waiting]) -> list[Computed]:
        """Gathers the rows of all calls sorted by expert, computes them, and hands each call its rows in its own order."""
        began, began_ns = time.monotonic(), time.time_ns()
        layer, weights = batch[0].call.layer, self._weights
        experts = np.concatenate([waiting.call.experts for waiting in batch])  # [A]
        order = np.argsort(experts, kind="stable")
        activated, counts = np.unique(experts, return_counts=True)
        rows = torch.empty(len(experts), self._mlp.hidden, dtype=self._dtype)
        into, start = codec.rows_of(rows), 0
        position = np.empty_like(order)
        position[order] = np.arange(len(order))  # where each assignment lies in expert order
        for waiting in batch:
            end = start + len(waiting.call.experts)
            into[position[start:end]] = waiting.call.payload[waiting.call.row_of]
            start = end
        outputs = grouped_expert_mlp(
            rows.to(self._device),
            counts.tolist(),
            [weights[layer, expert] for expert in activated.tolist()],
            activation=self._mlp.activation,
            gated=self._mlp.gated,
            interleaved=self._mlp.interleaved,
            transposed=self._mlp.transposed,
            limit=self._mlp.limit,
            alpha=self._mlp.alpha,
        ).cpu()
        computed = codec.rows_of(outputs)
        self._pace(began, len(experts))
        ended, ended_ns = time.monotonic(), time.time_ns()
        self._account(batch, began, ended, len(experts))
        results, start = [], 0
        for waiting in batch:
            end = start + len(waiting.call.experts)
            results.append(
                Computed(
                    payload=computed[position[start:end]],
                    activated_experts=len(activated),
                    batch_rows=len(experts),
                    queue_ms=1000 * (began - waiting.since),
                    compute_ms=1000 * (ended - began),
                    started_ns=began_ns,
                    ended_ns=ended_ns,
                )
            )
            start = end
        return results

    def _pace(self, began: float, rows: int) -> None:
        if self.capacity is not None:
            time.sleep(max(0.0, began + rows / self.capacity - time.monotonic()))

    def _account(self, batch: list[Waiting], began: float, ended: float, rows: int) -> None:
        with self._window_lock:
            self._window.busy_s += ended - began
            self._window.wait_s += sum(began - waiting.since for waiting in batch)
            self._window.rows += rows
            self._window.calls += len(batch)
