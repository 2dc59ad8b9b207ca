"""One MoE layer of one step on its way to the experts and back.

Exactness: each returned row is written once, to its own place [token, k]. Given the same rows, arrival order, replica, split,
retries and duplicates do not change a bit of the weighted sum in `model/seam.py`. (A row itself may depend on its batch.)

Two clocks. *Retry*: a call lost with its replica is sent to another holder at once; a slow call is hedged, within a budget, and
without it where its replica answers nothing at all.
*Coverage*: if no live replica holds an expert, or all are overloaded, the layer parks (requests keep their slots) until one can
take the rows or `expert_wait_s` is over; then HopFailed names the tokens that have no result.

Legend: T tokens, K experts per token, D hidden size, A = T * K assignments.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np

from moiety.errors import HopFailed, MoietyError, PeerLost, Unavailable
from moiety.internal.v1 import experts_pb2
from moiety.policy.dispatch import plan_dispatch
from moiety.router.hop.call import CallInFlight, RoutedRows, outcome_name, refusal, size_error
from moiety.router.hop.calls_in_flight import CallsInFlight
from moiety.router.hop.context import HopContext
from moiety.router.hop.parked import POLL_S, ParkedRows, wait_error
from moiety.router.hop.returned_rows import ReturnedRows
from moiety.router.step_context import StepContext
from moiety.telemetry.names import Attribute, SpanName
from moiety.wire.rows import RowBuffer, copy_rows
from moiety.wire.transports.connection import Reply

MAX_LOSSES = 5  # replicas that may be lost while computing the same rows; after more, the rows count as the cause


class LayerCall:
    """One layer's calls. `send` sends them, `wait` returns once every result is in `rows.output`.

    The thread that waits for one layer handles the answers of all layers.
    """

    def __init__(self, hop: HopContext, step: StepContext, rows: RoutedRows, began_ns: int):
        """`began_ns`: Unix time at which the previous layer ended, or the step began."""
        self._hop, self._step, self._rows = hop, step, rows
        self._missing = len(rows.wanted)  # results that are not in place yet
        self._filled = rows.experts < 0  # [A]
        self._calls = CallsInFlight(hop, step, rows, began_ns)
        self._resent = False  # the same rows may arrive twice
        self._refusing: set[str] = set()  # replicas that refused this layer or were lost, until the next retry
        self._full: set[str] = set()  # those of them that had no room
        self._failures: dict[int, MoietyError] = {}  # assignment -> a replica's error that waiting cannot cure
        self._lost_with: dict[str, np.ndarray] = {}  # replica -> bool [A]: it was lost while computing them
        self._returned = ReturnedRows(hop.dtype)
        self._parked = ParkedRows()
        self._error: BaseException | None = None

    def send(self) -> None:
        """Sends the rows to their experts."""
        layer, experts = self._rows.layer, self._rows.experts
        self._hop.demand.count(layer, experts if self._missing == len(experts) else experts[self._rows.wanted])
        self._dispatch(self._rows.wanted)

    def wait(self) -> None:
        """Waits for the results. Raises HopFailed, or what `StepContext.check` raises."""
        try:
            while self._missing and self._error is None:
                if len(self._parked):
                    self._check_parked()
                due = self._due()
                self._hop.wait(max(0.0, due - time.monotonic()))
                if (now := time.monotonic()) >= due:
                    self._on_time(now)
            if self._error is not None:
                raise self._error
        except BaseException as error:
            self._calls.span.error(error)
            raise
        finally:
            self.end()

    def end(self) -> None:
        """Gives up what is still in flight or parked. Late answers are ignored."""
        self._calls.give_up()
        self._parked.end()
        self._calls.span.end()

    # Sending -----------------------------------------------------------------------------------------------------

    def _dispatch(self, assignments: np.ndarray, attempt: int = 0) -> None:
        """Sends `assignments` to live holders. If an expert has no holder that can be called, the layer parks."""
        table, avoided = self._hop.fleet.table, self._hop.fleet.breakers.avoided(time.monotonic())
        planned = plan_dispatch(table, self._rows.layer, self._rows.experts, assignments, self._refusing | avoided)
        self._send_parts(planned.parts, attempt)
        if len(planned.uncovered) and avoided:  # a slow or sick holder is better than none
            planned = plan_dispatch(table, self._rows.layer, self._rows.experts, planned.uncovered, self._refusing)
            self._send_parts(planned.parts, attempt)
        if len(planned.uncovered):
            self._park(planned.uncovered)

    def _send_parts(self, parts: Mapping[str, np.ndarray], attempt: int, hedge_of: int | None = None) -> None:
        self._resent = self._resent or attempt > 0
        self._calls.send(parts, attempt, hedge_of, self._take)

    # Receiving ---------------------------------------------------------------------------------------------------

    def _take(self, call_id: int, answer: Reply | PeerLost) -> None:
        """Handles a call's answer. Errors are kept for `wait`, because the thread may be waiting for another layer."""
        if (call := self._calls.pop(call_id)) is None:
            return
        try:
            if isinstance(answer, PeerLost):
                self._lost(call, answer)
            elif answer.header.outcome == experts_pb2.OUTCOME_OK:
                self._place(call, answer)
                if not self._missing:
                    self._check_finite()
            else:
                self._refused(call, answer.header)
        except Exception as error:
            self._error = self._error or error
        finally:
            call.span.end()

    def _place(self, call: CallInFlight, reply: Reply) -> None:
        now = time.monotonic()
        if (error := size_error(call, reply, self._rows.hidden.row_bytes)) is not None:
            call.span.error(error)
            self._fail(call, error)
            self._send_again(call, avoid=call.replica)
            return
        self._hop.hedging.record_latency(self._rows.layer, self._step.call_class, now - call.sent)
        self._hop.record(call.replica, reply.header, now - call.sent)
        if call.hedge_of is not None and (slow := self._calls.get(call.hedge_of)) is not None:
            self._hop.fleet.overtaken(slow.replica, call.hedge_of, self._limit_s(slow))
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
        self._returned.add(call.replica, assignments)
        if self._resent:
            self._calls.give_up(self._filled)  # the slower of two calls for the same rows

    def _check_finite(self) -> None:
        """Sends rows with NaN or Inf again, to other holders, unless they are right. Called when all results are in place."""
        again = self._returned.to_compute_again(self._rows, self._hop.fleet.breakers, time.monotonic())
        for replica, assignments in again.items():
            self._filled[assignments] = False
            self._missing += len(assignments)
            self._resent = True
            self._refusing.add(replica)
            what = f"NaN or Inf for {len(assignments)} finite rows of layer {self._rows.layer}"
            self._failures.update(
                dict.fromkeys(assignments.tolist(), MoietyError(f"replica {replica} returned {what}"))
            )
        for assignments in again.values():
            self._dispatch(assignments, attempt=1)

    def _lost(self, call: CallInFlight, loss: PeerLost) -> None:
        call.span.error(loss)
        lost = self._lost_with.setdefault(call.replica, np.zeros(len(self._rows.experts), dtype=bool))
        lost[call.assignments] = True
        losses = int(sum(lost[call.assignments].astype(int) for lost in self._lost_with.values()).max())
        if losses > MAX_LOSSES:
            message = (
                f"layer {self._rows.layer}: {losses} replicas were lost while computing the same rows; last: {loss}"
            )
            raise HopFailed(self._tokens_of(call.assignments), Unavailable(message))
        self._send_again(call, avoid=call.replica)  # the table may still list it: we may be the first to know

    def _refused(self, call: CallInFlight, reply: experts_pb2.ForwardResponse) -> None:
        error = refusal(call, reply)
        call.span.set(Attribute.OUTCOME, outcome_name(reply.outcome))
        call.span.error(error)
        if reply.outcome in (experts_pb2.OUTCOME_NOT_HELD, experts_pb2.OUTCOME_WRONG_SYSTEM):
            self._hop.fleet.not_held(call.replica, str(error))
        elif reply.outcome == experts_pb2.OUTCOME_OVERLOADED:
            self._hop.fleet.breakers.overloaded(call.replica, time.monotonic())
            self._full.add(call.replica)
        elif reply.outcome != experts_pb2.OUTCOME_EXPIRED:
            self._fail(call, error)
        self._send_again(call, avoid=call.replica)

    def _fail(self, call: CallInFlight, error: MoietyError) -> None:
        """Keeps the `error` of a failed `call`. If its rows have no other holder to go to, `_check_parked` raises it."""
        self._hop.fleet.breakers.failed(call.replica, time.monotonic(), str(error))
        self._failures.update(dict.fromkeys(call.assignments.tolist(), error))

    def _send_again(self, call: CallInFlight, avoid: str) -> None:
        """Sends the rows of `call` to holders other than `avoid`. Leaves out rows that have arrived or are in another call."""
        self._refusing.add(avoid)
        self._dispatch(self._calls.without(call.assignments, self._filled), call.attempt + 1)

    # The two clocks ----------------------------------------------------------------------------------------------

    def _due(self) -> float:
        """The `time.monotonic()` of the next retry, or look at a slow call."""
        return min(self._parked.retry_at, self._calls.due())

    def _on_time(self, now: float) -> None:
        for call_id, call in self._calls.slow(now):
            self._look_at_slow(call_id, call, now)
        if now >= self._parked.retry_at:
            self._retry()

    def _look_at_slow(self, call_id: int, call: CallInFlight, now: float) -> None:
        """Sends the rows of a slow call to other holders too, if others that have not got them hold them and the budget allows.

        The budget keeps hedges from doubling the load of replicas that are merely busy. It does not count where the replica
        has answered nothing for a whole limit, or is only being probed. Where there is no other holder to ask, the rows
        stay where they are, and fail `expert_wait_s` after the limit.
        """
        waited_s, limit_s, layer = now - call.sent, self._limit_s(call), self._rows.layer
        late = waited_s >= limit_s
        if late:
            self._step.check()
        silent = late and not self._hop.fleet.answered_since(call.replica, max(call.sent, now - limit_s))
        table, avoid = self._hop.fleet.table, self._calls.asked(call.assignments) | self._refusing
        avoided = self._hop.fleet.breakers.avoided(now)
        elsewhere = plan_dispatch(table, layer, self._rows.experts, call.assignments, avoid | avoided)
        if silent and len(elsewhere.uncovered) and avoided:  # a replica that answers wrongly may be better than none
            elsewhere = plan_dispatch(table, layer, self._rows.experts, call.assignments, avoid)
        call.look_at = now + POLL_S if late else call.sent + limit_s
        if not len(elsewhere.uncovered):
            if silent or call.probe or (now >= call.hedge_at and self._hop.hedging.take()):
                self._send_parts(elsewhere.parts, call.attempt + 1, hedge_of=call_id)
            else:
                call.look_at = min(call.look_at, max(call.hedge_at, now + self._hop.hedging.least_s))
            return
        if silent:
            self._hop.fleet.breakers.silent(call.replica, now, waited_s, limit_s)
        if waited_s >= limit_s + self._hop.expert_wait_s:
            why = (
                f"layer {layer}: replica {call.replica} has not answered for {waited_s:.1f} s; there is no other to ask"
            )
            raise HopFailed(self._tokens_of(elsewhere.uncovered), Unavailable(why))

    def _limit_s(self, call: CallInFlight) -> float:
        return self._hop.limit_s(call.replica, len(call.assignments))

    def _park(self, uncovered: np.ndarray) -> None:
        """Parks the `uncovered` assignments until a live holder of their experts accepts them."""
        self._parked.add(
            uncovered,
            start_span=lambda: self._calls.start_span(SpanName.PARK),
            listen=lambda: self._hop.fleet.listen(self._retry_safely, self._room_freed),
        )

    def _check_parked(self) -> None:
        """Raises an error if waiting longer cannot help; otherwise reports to the registry which experts are missing."""
        parked, layer = self._parked.assignments, self._rows.layer
        unheld = self._without_holder(parked)
        if failed := [a for a in unheld.tolist() if a in self._failures]:
            self._returned.accuse(failed, self._hop.fleet.breakers, time.monotonic())
            raise HopFailed(self._tokens_of(failed), self._failures[failed[0]])
        missing = np.unique(self._rows.experts[unheld]).tolist()
        if (waited := self._parked.waited_s) >= self._hop.expert_wait_s:
            experts = np.unique(self._rows.experts[parked]).tolist()
            raise HopFailed(self._tokens_of(parked), wait_error(layer, experts, missing, waited))
        self._step.check()
        if missing:
            self._step.report_missing(layer, missing)

    def _without_holder(self, parked: np.ndarray) -> np.ndarray:
        """Returns those of the `parked` assignments for which no holder merely lacks room."""
        if not self._full:
            return parked
        table = self._hop.fleet.table
        others = set(table.replicas) - self._full
        return plan_dispatch(table, self._rows.layer, self._rows.experts, parked, others).uncovered

    def _room_freed(self) -> None:
        if self._full:
            self._retry_safely()

    def _retry_safely(self) -> None:
        """As `_retry`. An error is kept for `wait`, because the thread may be waiting for another layer."""
        try:
            self._retry()
        except Exception as error:
            self._error = self._error or error

    def _retry(self) -> None:
        """Sends the parked rows again, also to holders that refused before."""
        self._refusing.clear()
        self._full.clear()
        self._dispatch(self._parked.take(), attempt=1)
        if not len(self._parked):
            self._parked.end()

    def _tokens_of(self, assignments: np.ndarray | list[int]) -> list[int]:
        return np.unique(np.asarray(assignments) // self._rows.top_k).tolist()
