"""Exports over OTLP with one warning per outage in place of one per retry, and none during shutdown.

A collector that is down is the normal state of a laptop. The SDK logs every retry, and a stack trace if its channel is
closed under a call.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from opentelemetry.exporter.otlp.proto.grpc import exporter as otlp

_logger = logging.getLogger("moiety.telemetry")


class Quiet:
    """The outages of one exporter of `what`: spans, or metrics."""

    def __init__(self, what: str) -> None:
        self.failing = False  # since the last export that went through
        self._what = what
        self._closed = threading.Event()
        self._thread = 0  # the one inside export(): what the SDK logs there is ours to report
        otlp.logger.addFilter(self._not_ours)

    def export(self, send: Callable[[], bool]) -> bool:
        """Whether `send()` says that it worked; nothing is sent after `close`."""
        if self._closed.is_set():
            return False
        self._thread = threading.get_ident()
        try:
            sent = send()
        except Exception as error:
            self._failed(f"{type(error).__name__}: {error}")
            return False
        finally:
            self._thread = 0
            if self._closed.is_set():
                otlp.logger.removeFilter(self._not_ours)
        if not sent:
            self._failed("export failed")
        elif self.failing:
            self.failing = False
            _logger.info("%s are exported again", self._what)
        return sent

    def close(self, shutdown: Callable[[], object]) -> None:
        """Calls `shutdown()` of the exporter, once."""
        if not self._closed.is_set():
            self._closed.set()
            shutdown()
            if not self._thread:  # else the export that this cuts off still has something to log
                otlp.logger.removeFilter(self._not_ours)

    def _failed(self, why: str) -> None:
        if not (self.failing or self._closed.is_set()):
            _logger.warning("%s cannot be exported and are dropped until they can (said once): %s", self._what, why)
        self.failing = True

    def _not_ours(self, record: logging.LogRecord) -> bool:
        if record.thread != self._thread:
            return True
        self._failed(record.getMessage())
        return False


def within(timeout_s: float, action: Callable[[], object]) -> bool:
    """Whether `action`, on a thread of its own, came back in time."""
    thread = threading.Thread(target=action, name="telemetry-drain", daemon=True)
    thread.start()
    thread.join(timeout_s)
    return not thread.is_alive()
