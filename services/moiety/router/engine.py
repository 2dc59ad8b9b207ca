"""The engine: one thread that runs `step()` while there is work. Readable top to bottom:

admit -> schedule -> run -> sample -> emit

A step commits at its end: until then nothing of a sequence has changed, so a step that lost its experts beyond repair is
simply run again without the sequences that needed them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from moiety.core import FinishReason
from moiety.errors import (
    Cancelled,
    DeadlineExceeded,
    HopFailed,
    InvalidRequest,
    MoietyError,
    ResourceExhausted,
    Unavailable,
)
from moiety.model.seam import use_backend
from moiety.router.attention import CachedBatch, Segment
from moiety.router.context import StepBackend, StepContext
from moiety.router.kvcache import KVCache
from moiety.router.sampler import sample
from moiety.router.scheduler import Scheduler, StepPlan
from moiety.router.sequence import Emitted, Sequence
from moiety.telemetry.names import Attribute, SpanName
from moiety.telemetry.tracing import NO_SPAN, Span, Tracer

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Load:
    """What a gateway wants to know before it picks a router."""

    running: int
    waiting: int


class StepInterrupted(MoietyError):
    """A request of the step was given up while its layer waited for experts."""


class Engine:
    """Runs sequences through the model. `submit` and `cancel` may be called from any thread."""

    def __init__(
        self,
        model: torch.nn.Module,
        hop: StepBackend,
        cache: KVCache,
        *,
        slots: int,
        token_budget: int,
        queue_limit: int,
        threads: int,
        waits: Callable[[int, list[int]], None],
        tracer: Tracer,
    ):
        self._model, self._hop, self._cache = model, hop, cache
        self._scheduler = Scheduler(cache, slots, token_budget)
        self._queue_limit, self._threads, self._waits, self._tracer = queue_limit, threads, waits, tracer
        self._device = next(model.parameters()).device
        self._arrived: list[Sequence] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Ends the thread; whatever still runs ends with Unavailable, so that its gateway resumes it elsewhere."""
        with self._changed:
            self._stopping = True
            for sequence in (*self._scheduler.running, *self._scheduler.waiting, *self._arrived):
                sequence.cancelled = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def load(self) -> Load:
        return Load(len(self._scheduler.running), len(self._scheduler.waiting) + len(self._arrived))

    def submit(self, sequence: Sequence) -> None:
        """Queues a request. Raises ResourceExhausted when the queue is full, InvalidRequest when it can never run."""
        if sequence.most_tokens > self._cache.capacity:
            bound = f"at most {self._cache.capacity}, the KV cache's tokens (setting kv_memory)"
            raise InvalidRequest("prompt + max_tokens", sequence.most_tokens, bound)
        with self._changed:
            if self._stopping:
                raise Unavailable("this router is shutting down")
            waiting = len(self._arrived) + len(self._scheduler.waiting)
            if waiting >= self._queue_limit:
                raise ResourceExhausted(f"{waiting} of at most {self._queue_limit} requests wait for a slot", 1.0)
            self._arrived.append(sequence)
            self._changed.notify()

    def cancel(self, sequence: Sequence) -> None:
        """Frees the request's slot at the next step."""
        with self._changed:
            sequence.cancelled = True
            self._changed.notify()

    def step(self) -> bool:
        """One round; False when there is nothing to do."""
        self._admit()
        plan = self._scheduler.plan()
        if not plan.scheduled:
            return False
        span, linked = self._step_spans(plan)
        plan, logits = self._run_plan(plan, span)
        sampled = self._sample(plan, logits)
        self._tracer.start(SpanName.SAMPLE, parent=span, start_ns=self._hop.layer_began_ns).end()
        span.end()
        for other in linked:
            other.end()
        self._commit(plan, sampled)
        return True

    # The five parts of a step ------------------------------------------------------------------------------------

    def _admit(self) -> None:
        with self._changed:
            self._scheduler.waiting.extend(self._arrived)
            self._arrived.clear()
        for sequence in [s for s in (*self._scheduler.running, *self._scheduler.waiting) if s.given_up]:
            self._end_given_up(sequence)
        now = time.time_ns()
        for sequence in self._scheduler.admit():
            self._tracer.start(SpanName.QUEUE, parent=sequence.span, start_ns=sequence.submitted_ns).end(now)

    def _run_plan(self, plan: StepPlan, span: Span) -> tuple[StepPlan, torch.Tensor]:
        """The forward pass, again and again without those that cannot go on; returns what ran, and logits [S, V]."""
        while plan.scheduled:
            try:
                return plan, self._forward(plan, span)
            except HopFailed as failed:
                ended = _sequences_of(plan, failed.tokens)
                for sequence in ended:
                    self._end(sequence, Emitted(error=failed.cause))
                plan = plan.without(ended)
            except StepInterrupted:
                ended = [item.sequence for item in plan.scheduled if item.sequence.given_up]
                for sequence in ended:
                    self._end_given_up(sequence)
                plan = plan.without(ended)
        return plan, torch.empty(0, 0)

    @torch.inference_mode()
    def _forward(self, plan: StepPlan, span: Span) -> torch.Tensor:
        ids: list[int] = []
        positions: list[int] = []
        segments, last = [], []
        for item in plan.scheduled:
            past, end = item.sequence.computed, item.sequence.computed + item.count
            segments.append(Segment(item.sequence.request_id, len(ids), item.count, past))
            ids.extend(item.sequence.tokens[past:end])
            positions.extend(range(past, end))
            if item.samples:
                last.append(len(ids) - 1)

        def check() -> None:
            if self._stopping or any(item.sequence.given_up for item in plan.scheduled):
                raise StepInterrupted("a request of this step was given up")

        self._hop.begin_step(StepContext(plan.call_class, span, check, self._waits))
        with use_backend(self._hop):
            output = self._model(
                input_ids=torch.tensor([ids], device=self._device),
                position_ids=torch.tensor([positions], device=self._device),
                use_cache=False,
                logits_to_keep=torch.tensor(last or [0], device=self._device),
                moiety_batch=CachedBatch(segments, self._cache),
            )
        logits: torch.Tensor = output.logits[0]
        return logits

    def _sample(self, plan: StepPlan, logits: torch.Tensor) -> list[tuple[Sequence, Emitted]]:
        """A token for each sequence whose last one was computed; a failure to sample is that request's own."""
        sampled = []
        for row, sequence in enumerate(item.sequence for item in plan.scheduled if item.samples):
            try:
                token, logprob = sample(logits[row], sequence.sampling, sequence.generated)
                emitted = Emitted((token,), (logprob,) if sequence.sampling.logprobs else (), _finish(sequence, token))
            except Exception as error:
                _log.exception("sampling failed for request %s", sequence.request_id)
                emitted = Emitted(error=MoietyError(f"sampling failed: {type(error).__name__}: {error}"))
            sampled.append((sequence, emitted))
        return sampled

    def _commit(self, plan: StepPlan, sampled: list[tuple[Sequence, Emitted]]) -> None:
        """Only now has the step happened: cache lengths advance and tokens go out."""
        for item in plan.scheduled:
            item.sequence.computed += item.count
        for sequence, emitted in sampled:
            sequence.tokens.extend(emitted.token_ids)
            if emitted.finish is None and emitted.error is None:
                sequence.emit(emitted)
            else:
                self._end(sequence, emitted)

    # The thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        while not self._stopping:
            try:
                worked = self.step()
            except Exception as error:  # a bug: end what it touched, keep serving
                _log.exception("a step failed; its requests end")
                for sequence in list(self._scheduler.running):
                    self._end(sequence, Emitted(error=MoietyError(f"the step failed: {type(error).__name__}: {error}")))
                continue
            if not worked:
                with self._changed:
                    self._changed.wait_for(lambda: self._stopping or self._arrived, timeout=0.1)
        self._admit()

    def _step_spans(self, plan: StepPlan) -> tuple[Span, list[Span]]:
        """The step in the trace of its first sampled request, and a span linked to it in those of the others."""
        traced = [item.sequence.span for item in plan.scheduled if item.sequence.span.recording]
        if not traced:
            return NO_SPAN, []
        attributes: dict[Attribute, str | int] = {
            Attribute.STEP_CLASS: plan.call_class.value,
            Attribute.STEP_SEQUENCES: len(plan.scheduled),
            Attribute.STEP_TOKENS: sum(item.count for item in plan.scheduled),
        }
        span = self._tracer.start(SpanName.STEP, parent=traced[0], attributes=attributes)
        return span, [
            self._tracer.start(SpanName.STEP, parent=other, attributes=attributes, links=(span,))
            for other in traced[1:]
        ]

    def _end(self, sequence: Sequence, emitted: Emitted) -> None:
        self._scheduler.remove(sequence)
        if emitted.error is not None:
            sequence.span.error(emitted.error)
        sequence.span.end()
        sequence.emit(emitted)

    def _end_given_up(self, sequence: Sequence) -> None:
        error: MoietyError
        if self._stopping:
            error = Unavailable("this router is shutting down")
        elif sequence.cancelled:
            error = Cancelled("the client closed the stream")
        else:
            error = DeadlineExceeded(f"the deadline passed after {sequence.generated} tokens")
        self._end(sequence, Emitted(error=error))


def _finish(sequence: Sequence, token: int) -> FinishReason | None:
    """Whether `token` is the sequence's last."""
    if token in sequence.stop_ids and not sequence.sampling.ignore_eos:
        return FinishReason.STOP
    return FinishReason.LENGTH if sequence.generated + 1 >= sequence.sampling.max_tokens else None


def _sequences_of(plan: StepPlan, tokens: list[int]) -> list[Sequence]:
    """The sequences that own these positions of the packed step."""
    ended, start, wanted = [], 0, set(tokens)
    for item in plan.scheduled:
        if not wanted.isdisjoint(range(start, start + item.count)):
            ended.append(item.sequence)
        start += item.count
    return ended
