"""The engine: one thread that runs `step()` while there is work. Read it from top to bottom:

admit -> schedule -> run -> sample -> emit

A step commits at its end; until then no sequence advances. When experts are lost and no replica can take over, the
engine runs the step again without the sequences that needed them. A bug ends the request at which it shows, no other one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import inf

import torch

from moiety.core.progress import Progress
from moiety.core.supervise import supervise_thread
from moiety.errors import HopFailed, InvalidRequest, MoietyError, ResourceExhausted, Unavailable
from moiety.router.cache.kv_cache import KVCache
from moiety.router.delivery import Delivery
from moiety.router.sampling.emit import emissions
from moiety.router.schedule.retry_hint import AdmissionRate
from moiety.router.schedule.scheduler import Scheduler
from moiety.router.sequence.sequence import Emitted, Sequence, SequenceFault
from moiety.router.sequence.step_plan import Scheduled, StepPlan
from moiety.router.step_context import StepContext
from moiety.router.step_runner import StepRunner
from moiety.router.step_spans import step_spans
from moiety.telemetry.names import SpanName
from moiety.telemetry.tracing import Span, Tracer

MOST_FAILURES = 3  # steps in a row


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """A reading of an engine's load: gateways choose routers by it, and routers are scaled on it."""

    running: int
    waiting: int
    free_blocks: int  # KV cache blocks that no sequence holds, including cached prefixes
    admitted: int = 0  # requests that have started to run since the engine started
    waited_s: float = 0.0  # seconds that admitted requests waited in total before they ran


class StepInterrupted(MoietyError):
    """While a step waited for experts, one of its requests was cancelled or reached its deadline, or the engine was stopped."""


class Engine:
    """Runs sequences through the model. `submit` and `cancel` may be called from any thread."""

    def __init__(
        self,
        runner: StepRunner,
        cache: KVCache,
        *,
        slots: int,
        token_budget: int,
        queue_limit: int,
        threads: int,
        report_missing: Callable[[int, list[int]], None],
        tracer: Tracer,
        speculative_tokens: int = 0,
    ):
        self._runner, self._cache = runner, cache
        self._scheduler = Scheduler(cache, slots, token_budget, speculative_tokens)
        self._delivery = Delivery(self._scheduler)
        self._slots, self._rate = slots, AdmissionRate()
        self.queue_limit = queue_limit  # requests that may wait for a slot
        self._threads, self._report_missing, self._tracer = threads, report_missing, tracer
        self._admitted, self._waited_s = 0, 0.0
        self._arrived: list[Sequence] = []
        self._cancelled: list[Sequence] = []  # since the last step
        self._changed = threading.Condition()
        self._stopping = False
        self.turns = 0  # of the thread's loop
        self.stepped = False  # whether a step has succeeded
        self.steps = Progress(MOST_FAILURES, inf)  # steps that failed in a row; `engine_health.py` judges time
        self._thread = supervise_thread("engine", self._run)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Ends the thread. Unfinished requests end with Unavailable, so that their gateways resume them on other routers."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def blocks(self) -> int:
        """Number of blocks in the KV cache."""
        return self._cache.blocks

    @property
    def block_tokens(self) -> int:
        """Tokens per block. Prefixes are cached in whole blocks."""
        return self._cache.block_tokens

    @property
    def load(self) -> EngineLoad:
        waiting = len(self._scheduler.waiting) + len(self._arrived)
        running = len(self._scheduler.running)
        return EngineLoad(running, waiting, self._cache.free_blocks, self._admitted, self._waited_s)

    def submit(self, sequence: Sequence) -> None:
        """Queues a request. Raises ResourceExhausted when the queue is full, InvalidRequest when the request can never run."""
        prompt = len(sequence.encoder_ids)
        if self._cache.blocks_for(sequence.most_tokens) + self._cache.blocks_for(prompt) > self._cache.blocks:
            bound = f"at most {self._cache.capacity}, the size of the KV cache in tokens (setting kv_memory)"
            raise InvalidRequest("prompt + max_tokens", sequence.most_tokens + prompt, bound)
        if sequence.sampling.n > self._slots:
            bound = f"at most {self._slots}, the router's slots (setting slots)"
            raise InvalidRequest("sampling.n", sequence.sampling.n, bound)
        with self._changed:
            if self._stopping:
                raise Unavailable("this router is shutting down")
            waiting = len(self._arrived) + len(self._scheduler.waiting)
            free = max(0, self._slots - len(self._scheduler.running))  # the next step fills these slots from the queue
            if waiting >= self.queue_limit + free:
                problem = f"{waiting - free} of at most {self.queue_limit} requests wait for a slot"
                raise ResourceExhausted(problem, self._rate.retry_after(waiting, time.monotonic()))
            sequence.siblings = tuple(
                sequence.sibling(choice, self._tracer.start(SpanName.ENGINE_REQUEST, parent=sequence.span))
                for choice in range(sequence.choice + 1, sequence.choice + sequence.sampling.n)
            )
            self._arrived.append(sequence)
            self._changed.notify()

    def cancel(self, sequence: Sequence) -> None:
        """Cancels a request with all its choices. Their slots and blocks are freed at the next step."""
        with self._changed:
            sequence.cancelled = True
            self._cancelled.append(sequence)
            self._changed.notify()

    def check_integrity(self) -> None:
        """Raises RuntimeError where a KV block or state slot is lost or has too many holders. Call only between steps."""
        running = self._scheduler.running
        self._cache.check_integrity(table for sequence in running for table in (sequence.table, sequence.cross_table))

    def step(self) -> bool:
        """Runs one step. Returns False when there is nothing to do."""
        try:
            self._admit()
            plan = self._scheduler.plan_step()
        except SequenceFault as fault:
            self._fail(fault.__cause__, fault.sequence)
            return True
        if not plan.scheduled:
            return False
        span, linked = step_spans(self._tracer, plan)
        plan, logits = self._run_plan(plan, span)
        sampled = emissions(plan, logits)
        self._tracer.start(SpanName.SAMPLE, parent=span, start_ns=self._runner.last_layer_ns).end()
        span.end()
        for linked_span in linked:
            linked_span.end()
        self._commit(plan, sampled)
        return True

    # The parts of a step -----------------------------------------------------------------------------------------

    def _admit(self) -> None:
        waiting = self._scheduler.waiting
        with self._changed:
            for sequence in self._arrived:
                self._scheduler.add(sequence)
            cancelled, self._cancelled = self._cancelled, []
            self._arrived.clear()
        now, now_ns = time.monotonic(), time.time_ns()
        ended = [sequence for sequence in self._scheduler.running if self._stopping or sequence.must_end(now)]
        ended += [choice for one in cancelled for choice in (one, *one.forked) if choice in waiting]
        ended += waiting if self._stopping else waiting.late(now)
        for sequence in ended:
            self._delivery.end_early(sequence, stopping=self._stopping)
        for sequence in iter(self._scheduler.admit_next, None):
            if not sequence.admitted:  # otherwise it was preempted and runs again
                sequence.admitted = True
                self._rate.note(now)
                self._admitted += 1
                sequence.queued_us = max(now_ns - sequence.submitted_ns, 0) // 1000
                self._waited_s += sequence.queued_us / 1e6
                sequence.cached_tokens = min(sequence.computed, sequence.prompt_tokens)
                self._tracer.start(SpanName.QUEUE, parent=sequence.span, start_ns=sequence.submitted_ns).end(now_ns)

    def _run_plan(self, plan: StepPlan, span: Span) -> tuple[StepPlan, torch.Tensor]:
        """Runs `plan`, without the sequences that fail, until it succeeds. Returns the plan that ran and its logits [R, V].

        After an exception that is not ours, runs both halves of the plan for themselves, down to the sequence at fault.
        """
        while plan.scheduled:
            try:
                logits = self._runner.run(plan, self._context(plan, span))
                self.stepped = True
                self.steps.end(time.monotonic())
                return plan, logits
            except HopFailed as failed:
                ended = plan.owners(failed.tokens)
                for sequence in ended:
                    self._delivery.end(sequence, Emitted(error=failed.cause))
                plan = plan.without(ended)
            except StepInterrupted:
                now = time.monotonic()
                ended = [item.sequence for item in plan.scheduled if self._stopping or item.sequence.must_end(now)]
                for sequence in ended:
                    self._delivery.end_early(sequence, stopping=self._stopping)
                plan = plan.without(ended)
            except Exception as error:
                if len(plan.scheduled) == 1:
                    self._fail(error, plan.scheduled[0].sequence)
                    break
                parts = [self._run_plan(half, span) for half in plan.split(2)]
                done = [part for part in parts if part[0].scheduled]
                if not done:
                    break
                scheduled = (item for part, _ in done for item in part.scheduled)
                return StepPlan(tuple(scheduled)), torch.cat([logits for _, logits in done])
        return StepPlan(()), torch.empty(0, 0)

    def _context(self, plan: StepPlan, span: Span) -> StepContext:
        def check() -> None:
            now = time.monotonic()
            if self._stopping or any(item.sequence.must_end(now) for item in plan.scheduled):
                raise StepInterrupted("a request of this step was cancelled or reached its deadline")

        return StepContext(plan.call_class, span, check, self._report_missing)

    def _commit(self, plan: StepPlan, sampled: list[tuple[Sequence, Emitted]]) -> None:
        """Makes the step take effect: advances cache lengths, forks choices and emits tokens."""
        for sequence, emitted in sampled:
            sequence.tokens.extend(emitted.token_ids)
        for item in plan.scheduled:
            try:
                self._advance(item)
            except Exception as error:
                self._fail(error, item.sequence)
        for sequence, emitted in sampled:
            self._delivery.emit(sequence, emitted)

    def _fail(self, error: BaseException | None, *sequences: Sequence) -> None:
        """Ends sequences whose step raised an exception that is not ours. Of failures in a row one traceback is enough."""
        self._delivery.fail(error, *sequences, traceback=self.steps.fail(time.monotonic()))

    def _advance(self, item: Scheduled) -> None:
        sequence = item.sequence
        sequence.encoded = sequence.encoded or item.encode > 0
        if item.drafts and sequence.drafter is not None:
            accepted = len(sequence.tokens) - sequence.computed - 2
            sequence.drafter.learn(len(item.drafts), accepted, len(sequence.tokens))
            sequence.computed = len(sequence.tokens) - 1  # later tokens overwrite the entries of rejected drafts
        else:
            sequence.computed += item.count
        self._cache.commit(sequence.table, sequence.tokens, sequence.computed, sequence.tenant)
        if item.samples and sequence.siblings:
            self._scheduler.fork(sequence)

    # The thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        self._runner.use_threads(self._threads)
        while not self._stopping:
            self.turns += 1
            try:
                worked = self.step()
            except Exception as error:  # a bug that no request explains: end the running ones, keep serving
                self._fail(error, *self._scheduler.running)
                continue
            if not worked:
                self._runner.poll()
                with self._changed:
                    self._changed.wait_for(lambda: self._stopping or self._arrived or self._cancelled, timeout=0.1)
        self._admit()
