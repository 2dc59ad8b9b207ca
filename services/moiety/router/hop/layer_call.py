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
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import inf

import numpy as np

from moiety.errors import HopFailed, MoietyError, NoHolder, PeerLost, Unavailable
from moiety.internal.v1 import experts_pb2
from moiety.policy.dispatch import plan_dispatch
from moiety.router.hop.call import CALL_TIMEOUT_S, CallInFlight, outcome_name, request_for, size_error, split_by_size
from moiety.router.hop.context import HopContext
from moiety.router.hop.parked import ParkedRows
from moiety.router.step_context import StepContext
from moiety.telemetry.names import Attribute, SpanName
from moiety.telemetry.tracing import NO_SPAN, Span
from moiety.wire import codec
from moiety.wire.rows import RowBuffer, copy_rows
from moiety.wire.transports.connection import Reply

MAX_LOSSES = 5  # replicas that may be lost while computing the same rows; after more, the rows count as the cause


@dataclass(frozen=True, slots=True)
class RoutedRows:
    """One layer's rows, and the expert of each assignment. The caller owns the memory of both buffers."""

    layer: int
    top_k: int  # K
    experts: np.ndarray  # int64 [A]; -1: no expert
    wanted: np.ndarray  # int64: the assignments that have an expert, ascending
    hidden: RowBuffer  # [T]
    output: RowBuffer  # [A]: where the results go; zeros for assignments without an expert


class LayerCall:
    """One layer's calls. `send` sends them, `wait` returns once every result is in `rows.output`.

    The thread that waits for one layer handles the answers of all layers.
    """

    def __init__(self, hop: HopContext, step: StepContext, rows: RoutedRows):
        self._hop, self._step, self._rows = hop, step, rows
        self._missing = len(rows.wanted)  # results that are not in place yet
        self._filled = rows.experts < 0  # [A]
        self._calls: dict[int, CallInFlight] = {}
        self._resent = False  # the same rows may arrive twice
        self._refusing: set[str] = set()  # replicas that refused this layer or were lost, until the next retry
        self._failures: dict[int, MoietyError] = {}  # assignment -> a replica's error that waiting cannot cure
        self._losses: np.ndarray | None = None  # [A] replicas lost with each assignment
        self._parked = ParkedRows()
        self._error: BaseException | None = None
        self._span: Span = NO_SPAN

    def send(self, began_ns: int) -> None:
        """Sends the rows to their experts. `began_ns`: Unix time at which the previous layer ended, or the step began."""
        layer, experts = self._rows.layer, self._rows.experts
        self._span = self._start(SpanName.LAYER, self._step.span, {Attribute.LAYER: layer}, began_ns)
        self._start(SpanName.ATTENTION, self._span, {}, began_ns).end()
        self._hop.demand.count(layer, experts if self._missing == len(experts) else experts[self._rows.wanted])
        self._dispatch(self._rows.wanted)

    def wait(self) -> None:
        """Waits for the results. Raises HopFailed, or what `StepContext.check` raises."""
        try:
            while self._missing and self._error is None:
                if len(self._parked):
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
            self._parked.end()
            self._span.end()

    # Sending -----------------------------------------------------------------------------------------------------

    def _dispatch(self, assignments: np.ndarray, attempt: int = 0) -> None:
        """Sends `assignments` to live holders. If an expert has no holder that can be called, the layer parks."""
        table, suspects = self._hop.fleet.table, frozenset(self._hop.fleet.suspects)
        planned = plan_dispatch(table, self._rows.layer, self._rows.experts, assignments, self._refusing | suspects)
        self._send_parts(planned.parts, attempt)
        if len(planned.uncovered) and suspects:  # a slow holder is better than none
            planned = plan_dispatch(table, self._rows.layer, self._rows.experts, planned.uncovered, self._refusing)
            self._send_parts(planned.parts, attempt)
        if len(planned.uncovered):
            self._park(planned.uncovered)

    def _send_parts(self, parts: Mapping[str, np.ndarray], attempt: int, hedge_of: int | None = None) -> None:
        for replica, assignments in parts.items():
            for piece in split_by_size(assignments, self._rows.hidden.row_bytes):
                self._send(replica, piece, attempt, hedge_of)

    def _send(self, replica: str, assignments: np.ndarray, attempt: int, hedge_of: int | None) -> None:
        hop, rows, now = self._hop, self._rows, time.monotonic()
        call_id = hop.fleet.next_call_id()
        span = NO_SPAN
        if self._span.recording:
            attributes: dict[Attribute, str | int] = {
                Attribute.LAYER: rows.layer,
                Attribute.REPLICA: replica,
                Attribute.DEPLOYMENT: hop.fleet.deployment_of(replica),
                Attribute.ROWS: len(assignments),
                Attribute.ATTEMPT: attempt,
                Attribute.HEDGE: hedge_of is not None,
            }
            span = self._start(SpanName.HOP, self._span, attributes)
        header, tokens = request_for(assignments, rows.experts, rows.top_k, self._step.call_class)
        header.call_id, header.attempt, header.layer = call_id, attempt, rows.layer
        header.system_key, header.dtype = hop.system_key, codec.DTYPE_NAMES[hop.dtype]
        header.traceparent = span.traceparent
        hedge_at = inf if hedge_of is not None else now + hop.hedging.delay(rows.layer, self._step.call_class)
        self._calls[call_id] = CallInFlight(replica, assignments, attempt, now, hedge_at, hedge_of, span)
        self._resent = self._resent or attempt > 0
        hop.hedging.count_call()
        hop.fleet.send(replica, header, rows.hidden, tokens, len(assignments), partial(self._take, call_id))

    def _start(
        self, name: SpanName, parent: Span, attributes: Mapping[Attribute, str | int], start_ns: int | None = None
    ) -> Span:
        if not parent.recording:
            return NO_SPAN
        return self._hop.tracer.start(name, parent=parent, attributes=attributes, start_ns=start_ns)

    # Receiving ---------------------------------------------------------------------------------------------------

    def _take(self, call_id: int, answer: Reply | PeerLost) -> None:
        """Handles a call's answer. Errors are kept for `wait`, because the thread may be waiting for another layer."""
        if (call := self._calls.pop(call_id, None)) is None:
            return
        try:
            if isinstance(answer, PeerLost):
                self._lost(call, answer)
            elif answer.header.outcome == experts_pb2.OUTCOME_OK:
                self._place(call_id, call, answer)
            else:
                self._refused(call, answer.header)
        except Exception as error:
            self._error = self._error or error
        finally:
            call.span.end()

    def _place(self, call_id: int, call: CallInFlight, reply: Reply) -> None:
        if (error := size_error(call, reply, self._rows.hidden.row_bytes)) is not None:
            call.span.error(error)
            self._fail(call, error)
            self._send_again(call, avoid=call.replica)
            return
        self._hop.hedging.record_latency(self._rows.layer, self._step.call_class, time.monotonic() - call.sent)
        self._hop.record(call.replica, reply.header)
        if call.hedge_of in self._calls:
            self._hop.fleet.suspect(self._calls[call.hedge_of].replica, call.hedge_of)
        call.span.set(Attribute.QUEUE_MS, reply.header.queue_ms)
        call.span.set(Attribute.COMPUTE_MS, reply.header.compute_ms)
        assignments, new = call.assignments, None
        if self._resent:
            new = (~self._filled[assignments]).nonzero()[0]
            assignments = assignments[new]
        results = RowBuffer.within(reply.payload, self._rows.output.row_bytes)
        copy_rows(results, self._rows.output, chosen=new, places=assignments)
        self._filled[assignments] = True
        self._missing -= len(assignments)
        if not self._resent:
            return
        for other_id in [i for i, other in self._calls.items() if self._filled[other.assignments].all()]:
            # The slower of two calls for the same rows. Its answer is ignored, but shows that its replica is alive.
            self._calls.pop(other_id).span.end()

    def _lost(self, call: CallInFlight, loss: PeerLost) -> None:
        call.span.error(loss)
        if self._losses is None:
            self._losses = np.zeros(len(self._rows.experts), dtype=np.int64)
        self._losses[call.assignments] += 1
        if (losses := int(self._losses[call.assignments].max())) > MAX_LOSSES:
            message = (
                f"layer {self._rows.layer}: {losses} replicas were lost while computing the same rows; last: {loss}"
            )
            raise HopFailed(self._tokens_of(call.assignments), Unavailable(message))
        self._send_again(call, avoid=call.replica)  # the table may still list it: we may be the first to know

    def _refused(self, call: CallInFlight, reply: experts_pb2.ForwardResponse) -> None:
        outcome = outcome_name(reply.outcome)
        error = MoietyError(f"replica {call.replica} answered {outcome}: {reply.detail}")
        call.span.set(Attribute.OUTCOME, outcome)
        call.span.error(error)
        if reply.outcome in (experts_pb2.OUTCOME_NOT_HELD, experts_pb2.OUTCOME_WRONG_SYSTEM):
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
        return min(
            [self._parked.retry_at, *(min(call.hedge_at, call.sent + CALL_TIMEOUT_S) for call in self._calls.values())]
        )

    def _on_time(self, now: float) -> None:
        for call_id, call in list(self._calls.items()):
            if now >= call.sent + CALL_TIMEOUT_S:
                self._hop.fleet.reconnect(call.replica)  # this call's PeerLost arrives as an event
                call.sent = now
            if now >= call.hedge_at:
                self._hedge(call_id, call, now)
        if now >= self._parked.retry_at:
            self._retry()

    def _hedge(self, call_id: int, call: CallInFlight, now: float) -> None:
        """Sends the rows of a slow call to other holders too, if the hedge budget allows."""
        table, avoid = self._hop.fleet.table, {call.replica} | self._refusing | self._hop.fleet.suspects
        planned = plan_dispatch(table, self._rows.layer, self._rows.experts, call.assignments, avoid)
        if len(planned.uncovered):
            call.hedge_at = inf  # the other holders do not cover all its rows
        elif not self._hop.hedging.take():
            call.hedge_at = now + self._hop.hedging.least_s
        else:
            call.hedge_at = inf
            self._send_parts(planned.parts, call.attempt + 1, hedge_of=call_id)

    def _park(self, uncovered: np.ndarray) -> None:
        """Parks the `uncovered` assignments until a live holder of their experts accepts them."""
        self._parked.add(
            uncovered,
            start_span=lambda: self._start(SpanName.PARK, self._span, {}),
            listen=lambda: self._hop.fleet.on_table_change(self._table_changed),
        )

    def _check_parked(self) -> None:
        """Raises an error if waiting longer cannot help; otherwise reports to the registry which experts are missing."""
        parked, layer = self._parked.assignments, self._rows.layer
        if failed := [a for a in parked.tolist() if a in self._failures]:
            raise HopFailed(self._tokens_of(failed), self._failures[failed[0]])
        experts = np.unique(self._rows.experts[parked]).tolist()
        if (waited := self._parked.waited_s) >= self._hop.expert_wait_s:
            raise HopFailed(self._tokens_of(parked), NoHolder(layer, experts, waited))
        self._step.check()
        self._step.report_missing(layer, experts)

    def _table_changed(self) -> None:
        try:
            self._retry()
        except Exception as error:
            self._error = self._error or error

    def _retry(self) -> None:
        """Sends the parked rows again, also to holders that refused before."""
        self._refusing.clear()
        self._dispatch(self._parked.take(), attempt=1)
        if not len(self._parked):
            self._parked.end()

    def _tokens_of(self, assignments: np.ndarray | list[int]) -> list[int]:
        return np.unique(np.asarray(assignments) // self._rows.top_k).tolist()
