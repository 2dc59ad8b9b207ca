"""An environment without OTEL_* variables, and the endpoints that tests export to."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from moiety.tools.trace.receiver import TraceReceiver


@pytest.fixture(autouse=True)
def no_otel_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes the OTEL_* variables of the person who runs the tests."""
    for name in list(os.environ):
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[TraceReceiver]:
    """A collector, to which the environment points."""
    with TraceReceiver() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
        yield collector


@pytest.fixture
def dead_endpoint() -> Iterator[str]:
    """An address where nothing listens; the port stays bound, so that no other process can take it."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
