"""The autoscaling hook as Serve's controller uses it: copied by value and called often; it may not block or raise."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from ray import cloudpickle

from moiety.config.application import AppSettings
from moiety.core.load import ReplicaLoad
from moiety.core.replica import Replica, Role
from moiety.deploy import autoscaling_hook
from moiety.deploy.arguments import to_arguments
from moiety.registry.connect import connect
from moiety.registry.embedded_redis import EmbeddedRedis
from moiety.registry.interface import Registry
from moiety.telemetry import MetricName
from moiety.testing import eventually
from moiety.tools.trace.receiver import TraceReceiver

WAIT_S = 10.0


@dataclass
class Context:
    """The fields of Serve's AutoscalingContext that the policy reads."""

    deployment_name: str = "experts-0"
    target_num_replicas: int = 1
    capacity_adjusted_min_replicas: int = 1
    capacity_adjusted_max_replicas: int = 4


@pytest.fixture
def redis() -> Iterator[EmbeddedRedis]:
    """A server for one test: one of the tests stops it."""
    with EmbeddedRedis() as server:
        yield server


def _settings(redis: EmbeddedRedis) -> AppSettings:
    return AppSettings(
        model="m", app=f"test-{uuid.uuid4().hex[:8]}", cluster="here", revision="0" * 32, registry=redis.url
    )


def _policy(settings: AppSettings) -> Any:
    """Returns the policy after a copy by value, as Serve makes it."""
    cloudpickle.register_pickle_by_value(autoscaling_hook)
    try:
        copied = cloudpickle.loads(cloudpickle.dumps(autoscaling_hook.LoadPolicy))
    finally:
        cloudpickle.unregister_pickle_by_value(autoscaling_hook)
    return copied(arguments=to_arguments(settings), held="0:0-3")


@asynccontextmanager
async def _registry(settings: AppSettings) -> AsyncIterator[Registry]:
    registry = connect(settings.registry.get_secret_value(), settings.system)
    try:
        yield registry
    finally:
        await registry.close()


async def _report(settings: AppSettings, busy: float) -> None:
    """Reports load as a replica would."""
    async with _registry(settings) as registry:
        await registry.register(Replica("a", Role.EXPERT, "experts-0", "127.0.0.1:1", "node", "m", "r"))
        await registry.publish_load("a", ReplicaLoad(busy, 0.0, 100.0, 10.0))


async def test_a_busy_deployment_grows_and_the_decision_is_recorded(redis: EmbeddedRedis) -> None:
    """Load in the ledger raises the target, and the decision is recorded with its reason and its inputs."""
    settings = _settings(redis)
    policy, context = _policy(settings), Context()
    assert policy(context) == (1, {})
    await _report(settings, busy=1.0)
    await eventually(lambda: policy(context)[0] == 2)
    async with _registry(settings) as registry, asyncio.timeout(WAIT_S):
        while not (decisions := await registry.decisions()):
            await asyncio.sleep(0.05)
    (decision,) = decisions
    assert (decision["deployment"], decision["from"], decision["to"]) == ("experts-0", 1, 2)
    assert decision["reason"] == "busy 1.00 of 1 replica > target 0.60: 1 → 2"
    assert decision["inputs"]["busy"] == 1.0
    assert abs(decision["time"] - time.time()) < WAIT_S


async def test_live_bounds_win_over_the_arguments(redis: EmbeddedRedis) -> None:
    """Bounds changed in the running application apply from the next decision on."""
    settings = _settings(redis)
    policy = _policy(settings)
    context = Context(capacity_adjusted_min_replicas=3, capacity_adjusted_max_replicas=8)
    await eventually(lambda: policy(context)[0] == 3)


async def test_a_system_deployed_again_scales_by_its_new_settings(redis: EmbeddedRedis) -> None:
    """After a deployment with other settings these decide, and a policy of the earlier deployment gets no more targets."""
    settings = _settings(redis)
    before = _policy(settings)
    await eventually(lambda: before(Context(capacity_adjusted_min_replicas=3))[0] == 3)
    after = _policy(settings.model_copy(update={"rebalance_layers": 4}))
    await eventually(lambda: after(Context(capacity_adjusted_min_replicas=2))[0] == 2)
    await eventually(lambda: before(Context(target_num_replicas=1, capacity_adjusted_min_replicas=3))[0] == 1)


async def test_two_systems_of_one_application_scale_by_themselves(redis: EmbeddedRedis) -> None:
    """Each decides by its own load, and records its decisions where the other does not see them."""
    settings = _settings(redis)
    other = settings.model_copy(update={"groups": 4})
    mine, theirs = _policy(settings), _policy(other)
    await _report(settings, busy=1.0)
    await eventually(lambda: mine(Context())[0] == 2)
    await eventually(lambda: theirs(Context(capacity_adjusted_min_replicas=3))[0] == 3)
    assert mine(Context())[0] == 2
    async with _registry(settings) as one, _registry(other) as two:
        assert [entry["to"] for entry in await one.decisions()] == [2]
        assert [entry["to"] for entry in await two.decisions()] == [3]


async def test_targets_are_exported(redis: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target of each deployment is exported as a metric."""
    with TraceReceiver() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
        monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "300")
        settings = _settings(redis)
        policy, context = _policy(settings), Context(capacity_adjusted_min_replicas=3)

        def exported() -> set[tuple[object, ...]]:
            policy(context)
            figures = [figure for figure in receiver.metrics() if figure.name == MetricName.TARGET]
            names = ("moiety.deployment", "service.instance.id")
            return {(figure.service, figure.value, *map(figure.attributes.get, names)) for figure in figures}

        await eventually(lambda: exported() == {("moiety-autoscaler", 3, "experts-0", settings.app)})


async def test_without_a_registry_the_current_target_holds(redis: EmbeddedRedis) -> None:
    """When Redis is gone, the policy answers with Serve's current target, at once."""
    settings = _settings(redis)
    policy = _policy(settings)
    await _report(settings, busy=1.0)
    await eventually(lambda: policy(Context())[0] == 2)
    redis.stop()
    context = Context(target_num_replicas=2)
    for _ in range(20):
        began = time.monotonic()
        assert policy(context) == (2, {})
        assert time.monotonic() - began < 0.1
        await asyncio.sleep(0.05)


def test_the_policy_never_raises(caplog: pytest.LogCaptureFixture) -> None:
    """With unusable arguments the policy keeps the current target and logs that once, not at every call."""
    policy = autoscaling_hook.LoadPolicy(arguments={"nonsense": 1}, held="0:0")
    logger = logging.getLogger("ray.serve")  # it does not propagate
    logger.addHandler(caplog.handler)
    try:
        assert [policy(Context(target_num_replicas=3)) for _ in range(3)] == [(3, {})] * 3
    finally:
        logger.removeHandler(caplog.handler)
    assert [record.message for record in caplog.records] == ["experts-0: scaling failed, the current target stays"]
