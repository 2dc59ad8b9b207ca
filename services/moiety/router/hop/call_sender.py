"""Sends the calls of one layer: request message, span, and when to look whether the call is slow."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from moiety.errors import PeerLost
from moiety.router.hop.call import CallInFlight, RoutedRows, request_for
from moiety.router.hop.context import HopContext
from moiety.router.step_context import StepContext
from moiety.telemetry.names import Attribute, SpanName
from moiety.telemetry.tracing import NO_SPAN, Span
from moiety.wire import codec
from moiety.wire.transports.connection import Reply


class CallSender:
    """Sends calls of one layer of one step. `span` is the layer's, and the parent of the calls' spans."""

    def __init__(self, hop: HopContext, step: StepContext, rows: RoutedRows, began_ns: int):
        """`began_ns`: Unix time at which the previous layer ended, or the step began."""
        self._hop, self._step, self._rows = hop, step, rows
        self.span = self._start(SpanName.LAYER, step.span, {Attribute.LAYER: rows.layer}, began_ns)
        self.start_span(SpanName.ATTENTION, start_ns=began_ns).end()

    def start_span(
        self, name: SpanName, attributes: Mapping[Attribute, str | int] | None = None, start_ns: int | None = None
    ) -> Span:
        """Starts a span within the layer's."""
        return self._start(name, self.span, attributes or {}, start_ns)

    def send(
        self,
        replica: str,
        assignments: np.ndarray,
        attempt: int,
        hedge_of: int | None,
        take: Callable[[int, Reply | PeerLost], None],
    ) -> tuple[int, CallInFlight]:
        """Sends the rows of `assignments` to `replica`. Returns the call's id and its record.

        `take(id, answer)` is called once, on the engine's thread, after this method returned.
        """
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
        patience_s = hop.hedging.least_s if probe else hop.hedging.delay(rows.layer, self._step.call_class)
        hop.hedging.count_call()
        hop.fleet.send(replica, header, rows.hidden, tokens, len(assignments), partial(take, call_id))
        return call_id, CallInFlight(replica, assignments, attempt, now, now + patience_s, probe, hedge_of, span)

    def _start(
        self, name: SpanName, parent: Span, attributes: Mapping[Attribute, str | int], start_ns: int | None
    ) -> Span:
        if not parent.recording:
            return NO_SPAN
        return self._hop.tracer.start(name, parent=parent, attributes=attributes, start_ns=start_ns)
