"""values.schema.json is closed and refuses wrong types; `app` in it and in values.yaml is generated from the settings."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from typing import Any

import helm_python
import pytest
import yaml
from app_settings import SECTIONS, written
from rendering import CHART, EVERYTHING, MINIMAL, REPOSITORY, manifests, merged, named, nested

import moiety
from moiety.config.application import AppSettings
from moiety.config.validate import validated


def values() -> dict[str, Any]:
    """Returns values.yaml."""
    loaded: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
    return loaded


def schema() -> dict[str, Any]:
    """Returns values.schema.json."""
    loaded: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())
    return loaded


def objects(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the path and the sub-schema of every object with named properties."""
    if isinstance(node, dict):
        if "properties" in node and isinstance(node["properties"], dict):
            yield path, node
        for key, below in node.items():
            yield from objects(below, f"{path}/{key}")


def refuses(changes: dict[str, Any]) -> bool:
    """Whether the schema refuses valid values after `changes`."""
    try:
        helm_python.Chart.load(CHART).validate_schema(merged(EVERYTHING, changes))
    except helm_python.HelmError:
        return True
    return False


def test_every_object_is_closed() -> None:
    """Every object with named properties refuses an unknown one."""
    found = dict(objects(schema()))
    assert len(found) > 10
    assert [path for path, node in found.items() if node.get("additionalProperties") is not False] == []


@pytest.mark.parametrize(
    "path",
    [
        "replicas",
        "image.repo",
        "model.path",
        "app.model",
        "app.slots",
        "app.experts.replicas",
        "app.overrides.experts-1.replicas",
        "ray.head.cpu",
        "redis.password",
        "redis.external.password",
        "gateway.port",
        "telemetry.collector.port",
        "networkPolicy.ingress",
    ],
)
def test_an_unknown_key_is_refused(path: str) -> None:
    """An unknown key is an error at every level."""
    assert refuses(nested(path, 1))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("image.tag", 7),
        ("image.pullPolicy", "Sometimes"),
        ("image.pullSecrets", "mine"),
        ("model.hostPath", "relative"),
        ("model.folder", "../elsewhere"),
        ("app.groups", 0),
        ("app.groups", "2"),
        ("app.gateway.port", 0),
        ("app.gateway.http_port", 0),
        ("app.gateway.http", "off"),
        ("gateway.httpServiceAnnotations", {"class": 1}),
        ("app.dtype", "float8"),
        ("app.router.kv_memory", "lots"),
        ("app.experts.target_busy", 1.5),
        ("app.experts.capacity", 0),
        ("app.overrides", {"experts-1": {"capacity": 0}}),
        ("app.overrides", {"router": {}}),
        ("app.overrides", {"hot-0": {"overflow": "backup"}}),
        ("app.listen_host", "0.0.0.0:50051"),
        ("ray.version", "latest"),
        ("ray.auth", "off"),
        ("ray.autoscaling", "yes"),
        ("ray.workerGroups", []),
        ("ray.workerGroups", [{"name": "w"}]),
        ("gateway.serviceType", "ExternalName"),
        ("redis.external.url", "redis://:password@host:6379/0"),
        ("redis.resources.limits.memory", "much"),
        ("telemetry.endpoint", "collector:4317"),
        ("networkPolicy.clients", [{"anyone": True}]),
    ],
)
def test_a_wrong_value_is_refused(path: str, value: Any) -> None:
    """A value of the wrong type or out of bounds is an error, and so is a password in a URL."""
    assert refuses(nested(path, value))


def test_good_values_pass() -> None:
    """The values of the refusals above are valid without their change."""
    assert not refuses({})


@pytest.mark.parametrize("file", SECTIONS)
def test_app_has_the_applications_settings(file: str) -> None:
    """`app` has the application's settings, with their defaults, descriptions and bounds; else run app_settings.py."""
    assert (CHART / file).read_text() == written(file, SECTIONS[file]())


def test_the_application_accepts_its_arguments() -> None:
    """The arguments in serveConfigV2 are valid AppSettings, and the services listen for other pods."""
    document = named(manifests(MINIMAL), "RayService")
    assert document is not None
    application = yaml.safe_load(document["spec"]["serveConfigV2"])["applications"][0]
    settings = validated(AppSettings, application["args"])
    assert (settings.model, settings.listen_host) == ("/models", "0.0.0.0")


def test_versions_agree() -> None:
    """The chart's appVersion is the project's, and its Ray version is that of pyproject.toml and constraints.txt."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == moiety.__version__
    assert f"ray=={values()['ray']['version']}" in (REPOSITORY / "constraints.txt").read_text().splitlines()
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert any(need.startswith("ray[serve]>=2.60,") for need in project["optional-dependencies"]["serve"])


def test_the_collector_is_that_of_the_cluster_folder() -> None:
    """Chart and cluster/otel-collector.yaml run the same pipelines; only the listening addresses differ."""
    config_map = named(manifests(merged(MINIMAL, nested("telemetry.collector.enabled", True))), "ConfigMap")
    assert config_map is not None
    plain = (REPOSITORY / "cluster" / "otel-collector.yaml").read_text().replace("127.0.0.1", "0.0.0.0")
    assert yaml.safe_load(config_map["data"]["collector.yaml"]) == yaml.safe_load(plain)
