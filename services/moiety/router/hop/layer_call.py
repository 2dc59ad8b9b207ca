"""One MoE layer of one step on its way to the experts and back.

Exactness: each returned row is written once, to its own place [token, k]. Given the same rows, arrival order, replica, split,
retries and duplicates do not change a bit of the weighted sum in `model/seam.py`. (A row itself may depend on its batch.)

Two clocks. *Retry*: a call lost with its replica is sent to another holder at once; a slow call is hedged, within a budget.
*Coverage*: if no live replica holds an expert, the layer parks (requests keep their slots) until one registers or
`expert_wait_s` is over; then HopFailed names the tokens that have no result.

Legend: T tokens, K experts per token, D hidden size, A = T * K assignments.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from math import inf
from typing import TYPE_CHECKING

import numpy as np
import torch

from moiety.errors import HopFailed, MoietyError, NoHolder, PeerLost, Unavailable
from moiety.internal.v1 import experts_pb2
from moiety.policy.dispatch import plan_dispatch
from moiety.router.hop.call import CALL_TIMEOUT_S, CallInFlight, outcome_name, request_for, size_error, split_by_size
from moiety.router.step_context import StepContext
from moiety.telemetry.names import Attribute, SpanName
from moiety.telemetry.tracing import NO_SPAN, Span
from moiety.wire import codec
from moiety.wire.transports.connection import Reply

if TYPE_CHECKING:
    from moiety.router.hop.hop import Hop

POLL_S = 0.05  # how often a parked layer tries again and looks for cancelled requests
MAX_LOSSES = 5  # replicas that may be lost while computing the same rows; after more, the rows count as the cause

_NONE = np.empty(0, dtype=np.int64)


class LayerCall:
    """One layer's calls in flight; `result()` waits for all rows. Waits for other layers handle this layer's answers too."""

    def __init__(self, hop: Hop, step: StepContext, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor):
        self._hop, self._step, self._layer = hop, step, layer
        self._tokens, self._top_k = top_k_index.shape
        self._experts = top_k_index.reshape(-1).cpu().numpy()  # [A]
        self._device = hidden.device
        self._rows = codec.rows_of(hidden.contiguous().cpu())  # [T]
        wanted = (self._experts >= 0).nonzero()[0]
        self._missing = len(wanted)  # rows that are not in place yet
        whole = self._missing == len(self._experts)
        self._filled = np.zeros(len(self._experts), dtype=bool) if whole else self._experts < 0
        make = torch.empty if whole else torch.zeros  # rows without an expert are zero
        self._output = make(len(self._experts), hidden.shape[1], dtype=hidden.dtype)  # [A, D]
        self._places = codec.rows_of(self._output)  # [A]
        self._calls: dict[int, CallInFlight] = {}
        self._resent = False  # the same rows may arrive twice
        self._refusing: set[str] = set()  # replicas that refused this layer or were lost, until the next retry
        self._failures: dict[int, MoietyError] = {}  # assignment -> a replica's error that waiting cannot cure
        self._losses: np.ndarray | None = None  # [A] replicas lost with each assignment
        self._uncovered = _NONE  # assignments without a holder to call: while there are any, the layer is parked
        self._parked_s = 0.0  # time spent parked before `_parked_at`
        self._parked_at, self._retry_at = 0.0, inf
        self._park_span: Span = NO_SPAN
        self._stop_listening: Callable[[], None] | None = None
        self._error: BaseException | None = None
        began_ns = hop.layer_began_ns
        self._span = self._start(SpanName.LAYER, step.span, {Attribute.LAYER: layer}, began_ns)
        self._start(SpanName.ATTENTION, self._span, {}, began_ns).end()
        hop.demand.count(layer, self._experts if whole else self._experts[wanted])
        self._dispatch(wanted)

    @property
    def ready(self) -> bool:
        """Whether `result()` will return or raise without waiting."""
        return self._missing == 0 or self._error is not None

    def result(self) -> torch.Tensor:
        """Waits for the expert outputs [T, K, D], unweighted. Raises HopFailed, or what `StepContext.check` raises."""
        try:
            while not self.ready:
                if len(self._uncovered):
                    self._check_parked()
                self._hop.wait(max(0.0, self._due() - time.monotonic()))
                self._on_time(time.monotonic())
            if self._error is not None:
                raise self._error
        except BaseException as error:
            self._span.error(error)
            raise
        finally:
            for call in self._calls.values():
                call.span.end()
            self._calls.clear()  # late answers are ignored
            self._unpark()
            self._span.end()
            self._hop.layer_began_ns = time.time_ns()
        return self._output.view(self._tokens, self._top_k, -1).to(self._device)

    # Sending -----------------------------------------------------------------------------------------------------

    def _dispatch(self, assignments: np.ndarray, attempt: int = 0) -> None:
        """Sends `assignments` to live holders. If an expert has no holder that can be called, the layer parks."""
        table, suspects = self._hop.fleet.table, frozenset(self._hop.fleet.suspects)
        planned = plan_dispatch(table, self._layer, self._experts, assignments, self._refusing | suspects)
        self._send_parts(planned.parts, attempt)
        if len(planned.uncovered) and suspects:  # a slow holder is better than none
            planned = plan_dispatch(table, self._layer, self._experts, planned.uncovered, self._refusing)
            self._send_parts(planned.parts, attempt)
        if len(planned.uncovered):
            self._park(planned.uncovered)

    def _send_parts(self, parts: Mapping[str, np.ndarray], attempt: int, hedge_of: int | None = None) -> None:
        for replica, assignments in parts.items():
            for piece in split_by_size(assignments, self._places.itemsize):
                self._send(replica, piece, attempt, hedge_of)

    def _send(self, replica: str, assignments: np.ndarray, attempt: int, hedge_of: int | None) -> None:
        hop, now = self._hop, time.monotonic()
        call_id = hop.fleet.next_call_id()
        span = NO_SPAN
        if self._span.recording:
            attributes: dict[Attribute, str | int] = {
                Attribute.LAYER: self._layer,
                Attribute.REPLICA: replica,
                Attribute.DEPLOYMENT: hop.fleet.deployment_of(replica),
                Attribute.ROWS: len(assignments),
                Attribute.ATTEMPT: attempt,
                Attribute.HEDGE: hedge_of is not None,
            }
            span = self._start(SpanName.HOP, self._span, attributes)
        header, tokens = request_for(assignments, self._experts, self._top_k, self._step.call_class)
        header.call_id, header.attempt, header.layer = call_id, attempt, self._layer
        header.revision, header.dtype = hop.settings.revision, codec.DTYPE_NAMES[hop.settings.dtype]
        header.traceparent = span.traceparent
        hedge_at = inf if hedge_of is not None else now + hop.hedging.delay(self._layer, self._step.call_class)
        self._calls[call_id] = CallInFlight(replica, assignments, attempt, now, hedge_at, hedge_of, span)
        self._resent = self._resent or attempt > 0
        hop.hedging.count_call()
        hop.fleet.send(replica, header, self._rows, tokens, len(assignments), partial(self._take, call_id))

    def _start(
        self, name: SpanName, parent: Span, attributes: Mapping[Attribute, str | int], start_ns: int | None = None
    ) -> Span:
        if not parent.recording:
            return NO_SPAN
        return self._hop.tracer.start(name, parent=parent, attributes=attributes, start_ns=start_ns)

    # Receiving ---------------------------------------------------------------------------------------------------

    def _take(self, call_id: int, answer: Reply | PeerLost) -> None:
        """Handles a call's answer. Errors are kept for `result`, because the thread may be waiting for another layer."""
        if (call := self._calls.pop(call_id, None)) is None:
            return
        try:
            if isinstance(answer, PeerLost):
                call.span.error(answer)
                call.span.end()
                self._lost(call, answer)
            elif answer.header.outcome == experts_pb2.OUTCOME_OK:
                self._place(call_id, call, answer)
            else:
                self._refused(call, answer.header)
        except Exception as error:
            self._error = self._error or error

    def _place(self, call_id: int, call: CallInFlight, reply: Reply) -> None:
        if (error := size_error(call, reply, self._places.itemsize)) is not None:
            self._fail(call, error)
            self._send_again(call, avoid=call.replica)
            return
        rows = codec.rows_in(reply.payload, self._places.itemsize)
        self._hop.hedging.record_latency(self._layer, self._step.call_class, time.monotonic() - call.sent)
        self._hop.record(call.replica, reply.header)
        if call.hedge_of in self._calls:
            self._hop.fleet.suspect(self._calls[call.hedge_of].replica, call.hedge_of)
        call.span.set(Attribute.QUEUE_MS, reply.header.queue_ms)
        call.span.set(Attribute.COMPUTE_MS, reply.header.compute_ms)
        call.span.end()
        assignments = call.assignments
        if self._resent:
            new = ~self._filled[assignments]
            assignments, rows = assignments[new], rows[new]
        self._places[assignments] = rows
        self._filled[assignments] = True
        self._missing -= len(assignments)
        if not self._resent:
            return
        for other_id in [i for i, other in self._calls.items() if self._filled[other.assignments].all()]:
            # The slower of two calls for the same rows. Its answer is ignored, but shows that its replica is alive.
            self._calls.pop(other_id).span.end()

    def _lost(self, call: CallInFlight, loss: PeerLost) -> None:
        if self._losses is None:
            self._losses = np.zeros(len(self._experts), dtype=np.int64)
        self._losses[call.assignments] += 1
        if (losses := int(self._losses[call.assignments].max())) > MAX_LOSSES:
            message = f"layer {self._layer}: {losses} replicas were lost while computing the same rows; last: {loss}"
            raise HopFailed(self._tokens_of(call.assignments), Unavailable(message))
        self._send_again(call, avoid=call.replica)  # the table may still list it: we may be the first to know

    def _refused(self, call: CallInFlight, reply: experts_pb2.ForwardResponse) -> None:
        outcome = outcome_name(reply.outcome)
        error = MoietyError(f"replica {call.replica} answered {outcome}: {reply.detail}")
        call.span.set(Attribute.OUTCOME, outcome)
        call.span.error(error)
        call.span.end()
        if reply.outcome in (experts_pb2.OUTCOME_NOT_HELD, experts_pb2.OUTCOME_REVISION_MISMATCH):
            self._hop.fleet.describe_again(call.replica)
        elif reply.outcome not in (experts_pb2.OUTCOME_OVERLOADED, experts_pb2.OUTCOME_EXPIRED):
            self._fail(call, error)
        self._send_again(call, avoid=call.replica)

    def _fail(self, call: CallInFlight, error: MoietyError) -> None:
        """Keeps the `error` of a failed `call`. If its rows have no other holder to go to, `_check_parked` raises it."""
        self._failures.update(dict.fromkeys(call.assignments.tolist(), error))

    def _send_again(self, call: CallInFlight, avoid: str) -> None:
        """Sends the rows of `call` to holders other than `avoid`. Leaves out rows that have arrived or are in another call."""
        self._refusing.add(avoid)
        missing = ~self._filled
        for other in self._calls.values():
            missing[other.assignments] = False
        self._dispatch(call.assignments[missing[call.assignments]], call.attempt + 1)

    # The two clocks ----------------------------------------------------------------------------------------------

    def _due(self) -> float:
        """The `time.monotonic()` of the next hedge, timeout or retry."""
        return min([self._retry_at, *(min(call.hedge_at, call.sent + CALL_TIMEOUT_S) for call in self._calls.values())])

    def _on_time(self, now: float) -> None:
        for call_id, call in list(self._calls.items()):
            if now >= call.sent + CALL_TIMEOUT_S:
                self._hop.fleet.reconnect(call.replica)  # this call's PeerLost arrives as an event
                call.sent = now
            if now >= call.hedge_at:
                self._hedge(call_id, call, now)
        if now >= self._retry_at:
            self._retry()

    def _hedge(self, call_id: int, call: CallInFlight, now: float) -> None:
        """Sends the rows of a slow call to other holders too, if the hedge budget allows."""
        table, avoid = self._hop.fleet.table, {call.replica} | self._refusing | self._hop.fleet.suspects
        planned = plan_dispatch(table, self._layer, self._experts, call.assignments, avoid)
        if len(planned.uncovered):
            call.hedge_at = inf  # the other holders do not cover all its rows
        elif not self._hop.hedging.take():
            call.hedge_at = now + self._hop.hedging.least_s
        else:
            call.hedge_at = inf
            self._send_parts(planned.parts, call.attempt + 1, hedge_of=call_id)

    def _park(self, uncovered: np.ndarray) -> None:
        """Parks the `uncovered` assignments until a live holder of their experts accepts them."""
        self._uncovered = np.union1d(self._uncovered, uncovered)
        if self._stop_listening is None:
            self._parked_at = time.monotonic()
            self._park_span = self._start(SpanName.PARK, self._span, {})
            self._stop_listening = self._hop.fleet.on_table_change(self._table_changed)
        self._retry_at = time.monotonic() + POLL_S

    def _unpark(self) -> None:
        if self._stop_listening is not None:
            self._stop_listening()
            self._stop_listening = None
            self._parked_s += time.monotonic() - self._parked_at
            self._park_span.end()
            self._retry_at = inf

    def _check_parked(self) -> None:
        """Raises an error if waiting longer cannot help; otherwise reports to the registry which experts are missing."""
        experts = np.unique(self._experts[self._uncovered]).tolist()
        if failed := [a for a in self._uncovered.tolist() if a in self._failures]:
            raise HopFailed(self._tokens_of(failed), self._failures[failed[0]])
        waited = self._parked_s + time.monotonic() - self._parked_at
        if waited >= self._hop.settings.expert_wait_s:
            raise HopFailed(self._tokens_of(self._uncovered), NoHolder(self._layer, experts, waited))
        self._step.check()
        self._step.report_missing(self._layer, experts)

    def _table_changed(self) -> None:
        try:
            self._retry()
        except Exception as error:
            self._error = self._error or error

    def _retry(self) -> None:
        """Sends the parked rows again, also to holders that refused before."""
        self._refusing.clear()
        waiting, self._uncovered = self._uncovered, _NONE
        self._dispatch(waiting, attempt=1)
        if not len(self._uncovered):
            self._unpark()

    def _tokens_of(self, assignments: np.ndarray | list[int]) -> list[int]:
        return np.unique(np.asarray(assignments) // self._top_k).tolist()
