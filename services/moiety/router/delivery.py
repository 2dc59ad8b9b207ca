"""Delivers events to requests, and ends requests: after that, nothing of them is left in the scheduler or the cache."""

from __future__ import annotations

import logging
from dataclasses import replace

from moiety.errors import Cancelled, DeadlineExceeded, MoietyError, Unavailable
from moiety.router.schedule.scheduler import Scheduler
from moiety.router.sequence.sequence import Emitted, Sequence
from moiety.telemetry.names import Attribute

_log = logging.getLogger(__name__)


class Delivery:
    """Used by the engine's thread only. Ending a sequence twice has no effect."""

    def __init__(self, scheduler: Scheduler):
        self._scheduler = scheduler

    def emit(self, sequence: Sequence, emitted: Emitted) -> None:
        """Sends one event, the last one if it says so. If that raises, the request ends."""
        if sequence.ended:
            return
        if emitted.finish is not None or emitted.error is not None:
            self.end(sequence, emitted)
            return
        try:
            self._send(sequence, emitted)
        except Exception as error:
            self.fail(error, sequence)

    def end(self, sequence: Sequence, emitted: Emitted) -> None:
        """Ends a sequence, with its choices that have not started, and sends its last event."""
        if sequence.ended:
            return
        sequence.ended = True
        self._scheduler.remove(sequence)
        for sibling in sequence.siblings:
            self.end(sibling, emitted)
        if emitted.error is not None:
            sequence.span.error(emitted.error)
        if sequence.routed_rows:
            sequence.span.set(Attribute.REROUTED, sequence.rerouted_rows / sequence.routed_rows)
        sequence.span.end()
        try:
            self._send(sequence, emitted)
        except Exception:
            _log.exception("the end of request %s could not be sent", sequence.request_id)

    def end_early(self, sequence: Sequence, *, stopping: bool) -> None:
        """Ends a sequence that was cancelled or is late, or because the router is `stopping`."""
        error: MoietyError
        if stopping:
            error = Unavailable("this router is shutting down")
        elif sequence.is_cancelled:
            error = Cancelled("the client closed the stream")
        else:
            error = DeadlineExceeded(f"the deadline passed after {sequence.generated} tokens")
        self.end(sequence, Emitted(error=error))

    def fail(self, error: BaseException | None, *sequences: Sequence, traceback: bool = True) -> None:
        """Ends sequences for which an exception was raised that is not ours. Only the log tells which."""
        ids = ", ".join(one.request_id for one in sequences) or "(none)"
        _log.error("request %s failed: %r", ids, error, exc_info=error if traceback else None)
        for one in sequences:
            problem = f"the router failed to compute request {one.request_id}; its log says why"
            self.end(one, Emitted(error=MoietyError(problem)))

    def _send(self, sequence: Sequence, emitted: Emitted) -> None:
        if not sequence.emitted:
            sequence.emitted = True
            emitted = replace(emitted, cached_tokens=sequence.cached_tokens, queued_us=sequence.queued_us)
        if sequence.routed_rows:
            rows, rerouted = sequence.reported_rows
            sequence.reported_rows = sequence.routed_rows, sequence.rerouted_rows
            emitted = replace(
                emitted, routed_rows=sequence.routed_rows - rows, rerouted_rows=sequence.rerouted_rows - rerouted
            )
        sequence.emit(replace(emitted, choice=sequence.choice) if sequence.choice else emitted)
