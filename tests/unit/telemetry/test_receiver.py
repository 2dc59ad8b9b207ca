"""The in-memory OTLP endpoint."""

from __future__ import annotations

import re

import pytest

from moiety.telemetry import SpanName, configure
from moiety.tools.trace.receiver import TraceReceiver


def test_a_failed_wait_names_what_arrived():
    """A wait that times out names the spans that arrived, so that the missing one is plain."""
    with TraceReceiver() as receiver:
        tracer = configure("moiety-router", endpoint=receiver.endpoint)
        tracer.start(SpanName.STEP, parent=None).end()
        assert tracer.flush()
        with pytest.raises(TimeoutError, match=re.escape("1 arrived: step")):
            receiver.wait_for(lambda spans: len(spans) == 2, timeout_s=0.05)
        tracer.shutdown()


def test_memory_is_bounded():
    """Beyond the limit the oldest spans are dropped; `clear` drops all."""
    with TraceReceiver(limit=3) as receiver:
        tracer = configure("moiety-router", endpoint=receiver.endpoint)
        for start in range(5):
            tracer.start(SpanName.STEP, parent=None, start_ns=start).end(start + 1)
        tracer.shutdown()
        receiver.wait_for(len)
        assert [span.start_ns for span in receiver.spans()] == [2, 3, 4]
        receiver.clear()
        assert receiver.spans() == ()
