"""Fixtures of the hop's tests."""

from __future__ import annotations

import hop_scenarios
import pytest

from moiety.core.replica import Transport


@pytest.fixture(params=[Transport.GRPC, Transport.SHM])
def each_transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test once per transport. With gRPC the loop notices a loss first, with shared memory the engine's thread."""
    monkeypatch.setattr(hop_scenarios, "TRANSPORT", request.param)
