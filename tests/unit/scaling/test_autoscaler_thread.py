"""The autoscaler's thread goes on after a failure, and keeps what it knew."""

from __future__ import annotations

import time

import pytest

from moiety.config.application import AppSettings
from moiety.core.experts import ExpertSet
from moiety.core.supervise import TASKS
from moiety.core.system import SystemId
from moiety.registry.embedded_redis import EmbeddedRedis
from moiety.scaling import autoscaler
from moiety.scaling.ledger import Ledger, Reading


def _stops(running: autoscaler.Autoscaler) -> bool:
    """Stops the autoscaler; returns whether its thread has ended within 20 s."""
    running.stop()
    deadline = time.monotonic() + 20
    while running.alive and time.monotonic() < deadline:
        time.sleep(0.05)
    return not running.alive


class Flaky(Ledger):
    """A ledger whose first readings fail in a way that nobody expects."""

    readings = 0

    async def read(self) -> Reading:
        type(self).readings += 1
        if self.readings <= 2:
            raise RuntimeError("a bug in a reading")
        return await super().read()


def test_a_failing_round_does_not_end_scaling(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Rounds that raise are logged once and counted; then targets are published again."""
    monkeypatch.setattr(autoscaler, "Ledger", Flaky)
    TASKS.forget()
    with EmbeddedRedis() as server:
        settings = AppSettings(model="m", registry=server.url, groups=1, experts={"min_replicas": 2, "max_replicas": 4})
        running = autoscaler.Autoscaler(settings)
        subscription = autoscaler.Subscription(
            "experts-0", settings.scaling("experts-0"), ExpertSet(), asked_at=time.monotonic()
        )
        running.add(subscription)
        running.start()
        try:
            deadline = time.monotonic() + 20
            while subscription.target(1, 2, 4) != 2 and time.monotonic() < deadline:
                time.sleep(0.05)
            assert subscription.trusted() == 2
        finally:
            assert _stops(running)
    assert TASKS.failures["autoscaling"] == 2
    assert caplog.text.count("RuntimeError: a bug in a reading") == 1


def test_an_autoscaler_that_cannot_start_can_be_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that fails is repeated until `stop`."""

    def refuse(_url: str, _system: SystemId) -> None:
        raise RuntimeError("no registry")

    monkeypatch.setattr("moiety.registry.connect.connect", refuse)
    TASKS.forget()
    running = autoscaler.Autoscaler(AppSettings(model="m", registry="redis://127.0.0.1:1", groups=1))
    running.start()
    while TASKS.failures["autoscaler"] < 2:
        time.sleep(0.05)
    assert running.alive
    assert _stops(running)
