"""Exports over OTLP with one warning per outage instead of one per retry, and none during shutdown.

On a laptop there is usually no collector. The SDK by itself logs every retry, and a stack trace if its channel is closed
during a call.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TypeVar

from opentelemetry.exporter.otlp.proto.grpc import exporter as otlp

from moiety.core.supervise import spawn_thread

Result = TypeVar("Result")

_logger = logging.getLogger("moiety.telemetry")


class OutageLog:
    """Logs the outages of one exporter, one warning each, and ends it.

    `what` is the word for the exported data: spans or metrics. `shutdown` is the exporter's own; it is called once.
    """

    def __init__(self, what: str, shutdown: Callable[[], object]) -> None:
        self.failing = False  # since the last export that went through
        self._what, self._shutdown = what, shutdown
        self._closed = threading.Event()
        self._thread = 0  # the thread inside export(): we report what the SDK logs there
        # First, before the SDK's filter of duplicates: another exporter may just have logged the same.
        otlp.logger.filters.insert(0, self._passes)

    def export(self, send: Callable[[], Result], success: Result, failure: Result) -> Result:
        """Returns the result of `send()`, or `failure` if it raises. After `close`, sends nothing."""
        if self._closed.is_set():
            return failure
        self._thread = threading.get_ident()
        try:
            result = send()
        except Exception as error:
            self._failed(f"{type(error).__name__}: {error}")
            return failure
        finally:
            self._thread = 0
            if self._closed.is_set():
                otlp.logger.removeFilter(self._passes)
        if result is not success:
            self._failed("export failed")
        elif self.failing:
            self.failing = False
            _logger.info("exporting %s works again", self._what)
        return result

    def close(self) -> None:
        """Ends the exporter: cuts off a running export."""
        if not self._closed.is_set():
            self._closed.set()
            self._shutdown()
            if not self._thread:  # else a running export, cut off by this, still logs an error and removes the filter
                otlp.logger.removeFilter(self._passes)

    def drain(self, timeout_s: float, shutdown: Callable[[], object]) -> None:
        """Calls `shutdown`, which exports what is left. Ends the exporter first if it fails, or after `timeout_s`."""
        if self.failing:
            self.close()
        if not finishes_within(timeout_s, shutdown):
            self.close()  # cuts off the export that `shutdown` waits for

    def _failed(self, why: str) -> None:
        if not (self.failing or self._closed.is_set()):
            _logger.warning("exporting %s fails; dropping them until it works again: %s", self._what, why)
        self.failing = True

    def _passes(self, record: logging.LogRecord) -> bool:
        """Logging filter on the SDK's logger: drops what this exporter's own export logs, and logs our one warning instead."""
        if record.thread != self._thread:
            return True
        self._failed(record.getMessage())
        return False


def finishes_within(timeout_s: float, action: Callable[[], object]) -> bool:
    """Runs `action` on another thread; returns whether it has ended within `timeout_s`."""
    thread = spawn_thread("telemetry drain", action)
    thread.start()
    thread.join(timeout_s)
    return not thread.is_alive()
