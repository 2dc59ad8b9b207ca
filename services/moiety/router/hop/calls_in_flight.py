"""The calls of one layer: sends them, keeps those that are not answered yet, and gives up those that are no longer needed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from math import inf

import numpy as np

from moiety.errors import PeerLost
from moiety.router.hop import call_limits
from moiety.router.hop.call import CallInFlight, RoutedRows, request_for, split_by_size
from moiety.router.hop.context import HopContext
from moiety.router.hop.parked import POLL_S
from moiety.router.step_context import StepContext
from moiety.telemetry.names import Attribute, SpanName
from moiety.telemetry.tracing import NO_SPAN, Span
from moiety.wire import codec
from moiety.wire.transports.connection import Reply

Take = Callable[[int, Reply | PeerLost], None]  # receives a call's id and its answer


class CallsInFlight:
    """The calls of one layer of one step, by call id. `span` is the layer's, and the parent of the calls' spans.

    It does not keep what takes the answers: a circle of references would keep each layer's rows until the next garbage
    collection.
    """

    def __init__(self, hop: HopContext, step: StepContext, rows: RoutedRows, began_ns: int):
        """`began_ns`: Unix time at which the previous layer ended, or the step began."""
        self._hop, self._step, self._rows = hop, step, rows
        self._calls: dict[int, CallInFlight] = {}
        self.span: Span = NO_SPAN
        if step.span.recording:
            attributes: Mapping[Attribute, str | int] = {Attribute.LAYER: rows.layer}
            self.span = hop.tracer.start(SpanName.LAYER, parent=step.span, attributes=attributes, start_ns=began_ns)
            self.start_span(SpanName.ATTENTION, start_ns=began_ns).end()

    def start_span(
        self, name: SpanName, attributes: Mapping[Attribute, str | int] | None = None, start_ns: int | None = None
    ) -> Span:
        """Starts a span within the layer's."""
        if not self.span.recording:
            return NO_SPAN
        return self._hop.tracer.start(name, parent=self.span, attributes=attributes or {}, start_ns=start_ns)

    def send(self, parts: Mapping[str, np.ndarray], attempt: int, hedge_of: int | None, take: Take) -> None:
        """Sends the rows of `parts` (replica -> assignments), split into calls of a bounded size.

        `take(id, answer)` is called once per call, on the engine's thread, after this method returned.
        """
        for replica, assignments in parts.items():
            for piece in split_by_size(assignments, self._rows.hidden.row_bytes):
                self._send(replica, piece, attempt, hedge_of, take)

    def get(self, call_id: int | None) -> CallInFlight | None:
        return None if call_id is None else self._calls.get(call_id)

    def pop(self, call_id: int) -> CallInFlight | None:
        """Takes out a call that was answered. Returns None for one that was given up."""
        return self._calls.pop(call_id, None)

    def due(self) -> float:
        """The `time.monotonic()` at which the next call is to be looked at; inf if there is none."""
        return min((call.look_at for call in self._calls.values()), default=inf)

    def slow(self, now: float) -> list[tuple[int, CallInFlight]]:
        """Returns the calls to look at by `now`, with their ids, except those that are hedged already."""
        slow = [(call_id, call) for call_id, call in self._calls.items() if now >= call.look_at]
        hedged = {call.hedge_of for call in self._calls.values()} if slow else ()
        for call_id, call in slow:
            if call_id in hedged:
                call.look_at = now + POLL_S  # its hedge may be lost
        return [(call_id, call) for call_id, call in slow if call_id not in hedged]

    def asked(self, assignments: np.ndarray) -> frozenset[str]:
        """Returns the replicas with a call in flight that has any of `assignments`."""
        calls = self._calls.values()
        return frozenset(call.replica for call in calls if np.isin(call.assignments, assignments).any())

    def without(self, assignments: np.ndarray, filled: np.ndarray) -> np.ndarray:
        """Returns those of `assignments` that have not arrived (`filled` [A]) and are in no call."""
        missing = ~filled
        for call in self._calls.values():
            missing[call.assignments] = False
        return assignments[missing[assignments]]

    def give_up(self, filled: np.ndarray | None = None) -> None:
        """Cancels the calls of which all rows are `filled` [A], by default all calls, and ignores their answers.

        A late answer still shows that its replica is alive.
        """
        for call_id, call in list(self._calls.items()):
            if filled is None or filled[call.assignments].all():
                del self._calls[call_id]
                call.span.end()
                self._hop.fleet.cancel(call.replica, call_id, call.attempt)

    def _send(self, replica: str, assignments: np.ndarray, attempt: int, hedge_of: int | None, take: Take) -> None:
        hop, rows, now = self._hop, self._rows, time.monotonic()
        call_id = hop.fleet.next_call_id()
        span = NO_SPAN
        if self.span.recording:
            attributes: dict[Attribute, str | int] = {
                Attribute.LAYER: rows.layer,
                Attribute.REPLICA: replica,
                Attribute.DEPLOYMENT: hop.fleet.deployment_of(replica),
                Attribute.ROWS: len(assignments),
                Attribute.ATTEMPT: attempt,
                Attribute.HEDGE: hedge_of is not None,
            }
            span = self.start_span(SpanName.HOP, attributes)
        header, tokens = request_for(assignments, rows.experts, rows.top_k, self._step.call_class)
        header.call_id, header.attempt, header.layer = call_id, attempt, rows.layer
        header.system_key, header.dtype = hop.system_key, codec.DTYPE_NAMES[hop.dtype]
        header.traceparent = span.traceparent
        probe = hop.fleet.breakers.sent(replica, now)
        hedge_s = hop.hedging.least_s if probe else hop.hedging.delay(rows.layer, self._step.call_class)
        hedge_at, look_at = now + hedge_s, now + min(hedge_s, call_limits.FLOOR_S)
        hop.hedging.count_call()
        self._calls[call_id] = CallInFlight(
            replica, assignments, attempt, now, hedge_at, look_at, probe, hedge_of, span
        )
        hop.fleet.send(replica, header, rows.hidden, tokens, len(assignments), partial(take, call_id))
