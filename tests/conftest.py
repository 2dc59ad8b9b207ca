"""Fixtures that all tests share, made once a session: a layout cache, tiny checkpoints, one served system."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Ray reads these when it is first imported, by any test: they make it listen on loopback only and ask for no token.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")


from moiety.local.cluster import LocalCluster
from moiety.registry.embedded_redis import EmbeddedRedis
from moiety.synthetic import write_tiny
from moiety.tools.trace.receiver import TraceReceiver
from support.interpreter import import_interpreted
from support.serving import Served

import_interpreted()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Makes the tests, and the processes they start, keep derived layouts in a folder of this session."""
    before = os.environ.get("MOIETY_CACHE")
    os.environ["MOIETY_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["MOIETY_CACHE"]
    else:
        os.environ["MOIETY_CACHE"] = before


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Returns the folder of an architecture's tiny random checkpoint, in its publisher's layout; made once."""
    folders: dict[str, Path] = {}

    def folder(architecture: str) -> str:
        if architecture not in folders:
            folders[architecture] = write_tiny(architecture, tmp_path_factory.mktemp(architecture))
        return str(folders[architecture])

    return folder


@pytest.fixture(scope="session")
def served(tiny: Callable[[str], str]) -> Iterator[Served]:
    """Serves qwen3_moe in fp32 with two expert groups, one router and one gateway, for the whole session."""
    with TraceReceiver() as receiver, EmbeddedRedis() as redis, asyncio.Runner() as runner:
        cluster = LocalCluster(
            tiny("qwen3_moe"),
            dtype="float32",
            registry=redis.url,
            env={
                "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint,
                "OTEL_BSP_SCHEDULE_DELAY": "200",
                "OTEL_METRIC_EXPORT_INTERVAL": "1000",
            },
        )
        runner.run(cluster.__aenter__())
        try:
            yield Served(cluster, receiver, redis, runner)
        finally:
            runner.run(cluster.stop())
