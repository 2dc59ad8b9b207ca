"""The Dockerfile, its health check and the collector's configuration."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import grpc
import pytest
from cluster_files import CLUSTER, REPOSITORY, load
from grpc_health.v1 import health, health_pb2, health_pb2_grpc


def copied_paths(dockerfile: str) -> list[str]:
    """Returns the sources of the COPY instructions."""
    lines = dockerfile.replace("\\\n", " ").splitlines()
    return [source for line in lines if line.startswith("COPY ") for source in line.split()[1:-1]]


def test_the_image_copies_what_exists() -> None:
    """Every COPY source is in the repository, and the ignore file admits exactly these sources."""
    sources = copied_paths((CLUSTER / "Dockerfile").read_text())
    assert len(sources) >= 6
    assert [source for source in sources if not (REPOSITORY / source).exists()] == []
    ignored = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignored[0] == "*"
    assert {line[1:] for line in ignored if line.startswith("!")} == set(sources)


def test_the_image_runs_without_root() -> None:
    """The image's last USER is numeric, as the chart's runAsNonRoot needs, and no build argument is a secret."""
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    assert [line for line in lines if line.startswith("USER")][-1] == "USER 1000"
    assert [line for line in lines if line.startswith("ARG")] == ["ARG DEVICE=cpu"]


def test_the_collectors_pipelines_are_complete() -> None:
    """Each pipeline names defined components, and each defined component is used."""
    config = load("otel-collector.yaml")
    service = config.pop("service")
    used: dict[str, set[str]] = {"extensions": set(service["extensions"])}
    for pipeline in service["pipelines"].values():
        for kind, names in pipeline.items():
            used.setdefault(kind, set()).update(names)
    assert {kind: set(components) for kind, components in config.items()} == used


@pytest.fixture
def healthcheck() -> ModuleType:
    """cluster/healthcheck.py, a script of the image that is not part of the package."""
    spec = importlib.util.spec_from_file_location("healthcheck", CLUSTER / "healthcheck.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def health_server() -> Iterator[tuple[str, health.HealthServicer]]:
    """A gRPC server on a free loopback port that speaks the health protocol."""
    server = grpc.server(ThreadPoolExecutor(max_workers=1))
    servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}", servicer
    server.stop(None).wait(5)


def test_the_health_check_reports_the_state(
    healthcheck: ModuleType, health_server: tuple[str, health.HealthServicer]
) -> None:
    """A serving gateway is healthy; a draining or absent one is not."""
    address, servicer = health_server
    servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    assert healthcheck.serving(address)
    servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    assert not healthcheck.serving(address)
    assert not healthcheck.serving("127.0.0.1:1")
