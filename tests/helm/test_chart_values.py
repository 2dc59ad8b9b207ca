"""One value, one assertion: every documented value changes the manifests in the right place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import yaml
from rendering import CHART, MINIMAL, dig, leaves, manifests, merged, named, nested

HEAD = "spec/rayClusterConfig/headGroupSpec/template/spec"
GROUP = "spec/rayClusterConfig/workerGroupSpecs/0"
WORKER = f"{GROUP}/template/spec"
CONTAINER = "spec/template/spec/containers/0"
ARGS = "spec/serveConfigV2/applications/0/args"
RESOURCES = {"requests": {"cpu": "3"}, "limits": {"nvidia.com/gpu": 1}}
TOLERATIONS = [{"key": "gpu", "operator": "Exists"}]
COLLECTOR = nested("telemetry.collector.enabled", True)
EXTERNAL = merged(nested("redis.enabled", False), nested("redis.external.url", "redis://elsewhere:6379/0"))


@dataclass(frozen=True)
class Case:
    """Setting `path` to `value` must put `expected` at `where` in the object of `kind` whose name ends in `name`."""

    path: str
    value: Any
    where: str
    expected: Any
    kind: str = "RayService"
    name: str = ""
    given: dict[str, Any] = field(default_factory=dict)


def group(name: str, value: Any, where: str) -> Case:
    """Returns the case of a value of the first worker group; Helm replaces a list as a whole."""
    default = yaml.safe_load((CHART / "values.yaml").read_text())["ray"]["workerGroups"][0]
    return Case("ray.workerGroups", [default | {name: value}], where, value, given={"_leaf": name})


def secret(name: str, key: str) -> dict[str, Any]:
    """Returns the source of a variable that is taken from the Secret `name`."""
    return {"secretKeyRef": {"name": name, "key": key}}


CASES = [
    Case("image.repository", "r.example.com/x", f"{WORKER}/containers/0/image", "r.example.com/x:0.1.0"),
    Case("image.tag", "7", f"{HEAD}/containers/0/image", "registry.example.com/moiety:7"),
    Case("image.pullPolicy", "Always", f"{WORKER}/containers/0/imagePullPolicy", "Always"),
    Case("image.pullSecrets", ["mine"], f"{HEAD}/imagePullSecrets/0/name", "mine"),
    Case("model.existingClaim", "other", f"{WORKER}/volumes/0/persistentVolumeClaim/claimName", "other"),
    Case(
        "model.hostPath",
        "/srv/models",
        f"{HEAD}/volumes/0/hostPath/path",
        "/srv/models",
        given=nested("model.existingClaim", ""),
    ),
    Case("model.folder", "mixtral", f"{ARGS}/model", "/models/mixtral"),
    Case("ray.version", "2.60.1", "spec/rayClusterConfig/rayVersion", "2.60.1"),
    Case("ray.auth", "disabled", "spec/rayClusterConfig/authOptions/mode", "disabled"),
    Case("ray.autoscaling", False, "spec/rayClusterConfig/enableInTreeAutoscaling", False),
    Case(
        "ray.extraEnv",
        [{"name": "OTEL_TRACES_SAMPLER_ARG", "value": "0.1"}],
        f"{WORKER}/containers/0/env/3",
        {"name": "OTEL_TRACES_SAMPLER_ARG", "value": "0.1"},
    ),
    Case("ray.head.resources", RESOURCES, f"{HEAD}/containers/0/resources/requests/cpu", "3"),
    Case("ray.head.nodeSelector", {"disk": "ssd"}, f"{HEAD}/nodeSelector", {"disk": "ssd"}),
    Case("ray.head.tolerations", TOLERATIONS, f"{HEAD}/tolerations", TOLERATIONS),
    group("name", "gpus", f"{GROUP}/groupName"),
    group("replicas", 3, f"{GROUP}/replicas"),
    group("minReplicas", 0, f"{GROUP}/minReplicas"),
    group("maxReplicas", 9, f"{GROUP}/maxReplicas"),
    group("resources", RESOURCES, f"{WORKER}/containers/0/resources"),
    group("nodeSelector", {"gpu": "l4"}, f"{WORKER}/nodeSelector"),
    group("tolerations", TOLERATIONS, f"{WORKER}/tolerations"),
    Case("gateway.serviceType", "LoadBalancer", "spec/serveService/spec/type", "LoadBalancer"),
    Case("gateway.serviceAnnotations", {"a": "b"}, "spec/serveService/metadata/annotations", {"a": "b"}),
    Case("gateway.httpServiceAnnotations", {"c": "d"}, "metadata/annotations", {"c": "d"}, "Service", "-http"),
    Case("redis.enabled", False, "kind", None, "Deployment", "-redis", EXTERNAL),
    Case("redis.image.repository", "valkey/valkey", f"{CONTAINER}/image", "valkey/valkey:7.2-bookworm", "Deployment"),
    Case("redis.image.tag", "7.4-bookworm", f"{CONTAINER}/image", "redis:7.4-bookworm", "Deployment"),
    Case("redis.existingSecret.name", "s", f"{CONTAINER}/env/0/valueFrom", secret("s", "password"), "Deployment"),
    Case(
        "redis.existingSecret.key",
        "word",
        f"{WORKER}/containers/0/env/0/valueFrom",
        secret("s", "word"),
        given=nested("redis.existingSecret.name", "s"),
    ),
    Case("redis.resources", RESOURCES, f"{CONTAINER}/resources/requests/cpu", "3", "Deployment"),
    Case(
        "redis.external.url",
        "rediss://cache.example.com:6379/0",
        f"{WORKER}/containers/0/env/0/value",
        "rediss://cache.example.com:6379/0",
        given=EXTERNAL,
    ),
    Case(
        "redis.external.existingSecret.name",
        "s",
        f"{HEAD}/containers/0/env/0/valueFrom",
        secret("s", "url"),
        given=EXTERNAL,
    ),
    Case(
        "redis.external.existingSecret.key",
        "address",
        f"{WORKER}/containers/0/env/0/valueFrom",
        secret("s", "address"),
        given=merged(EXTERNAL, nested("redis.external.existingSecret.name", "s")),
    ),
    Case("telemetry.endpoint", "http://x:4317", f"{WORKER}/containers/0/env/3/value", "http://x:4317"),
    Case("telemetry.collector.enabled", True, "spec/ports/0/port", 4317, "Service", "-collector"),
    Case(
        "telemetry.collector.image.repository",
        "x/collector",
        f"{CONTAINER}/image",
        "x/collector:0.115.1",
        "Deployment",
        "-collector",
        COLLECTOR,
    ),
    Case(
        "telemetry.collector.image.tag",
        "1.0",
        f"{CONTAINER}/image",
        "otel/opentelemetry-collector:1.0",
        "Deployment",
        "-collector",
        COLLECTOR,
    ),
    Case(
        "telemetry.collector.forwardTo",
        "http://tempo:4317",
        "data/collector.yaml/exporters/otlp",
        {"endpoint": "http://tempo:4317", "tls": {"insecure": True}},
        "ConfigMap",
        "-collector",
        COLLECTOR,
    ),
    Case(
        "telemetry.collector.resources",
        RESOURCES,
        f"{CONTAINER}/resources/requests/cpu",
        "3",
        "Deployment",
        "-collector",
        COLLECTOR,
    ),
    Case("networkPolicy.enabled", True, "spec/policyTypes", ["Ingress"], "NetworkPolicy", "-gateway"),
    Case(
        "networkPolicy.clients",
        [{"ipBlock": {"cidr": "10.0.0.0/8"}}],
        "spec/ingress/0/from",
        [{"ipBlock": {"cidr": "10.0.0.0/8"}}],
        "NetworkPolicy",
        "-gateway",
        nested("networkPolicy.enabled", True),
    ),
]


def leaf_of(case: Case) -> str:
    """Returns the path of the documented value that `case` tests."""
    return ".".join(filter(None, (case.path, case.given.get("_leaf"))))


def found(case: Case, values: dict[str, Any]) -> Any:
    """Returns what the chart renders from `values` at the place of `case`; YAML inside strings is parsed."""
    document = named(manifests(values), case.kind, case.name)
    if document is None:
        return None
    if case.kind == "RayService":
        document["spec"]["serveConfigV2"] = yaml.safe_load(document["spec"]["serveConfigV2"])
    if case.kind == "ConfigMap":
        document["data"] = {key: yaml.safe_load(text) for key, text in document["data"].items()}
    return dig(document, case.where)


@pytest.mark.parametrize("case", CASES, ids=leaf_of)
def test_a_value_reaches_its_place(case: Case) -> None:
    """Changing one value changes the manifest in the right place, where the default gives something else."""
    given = {key: value for key, value in case.given.items() if key != "_leaf"}
    # `given` holds what the case needs besides its value; the value itself keeps its default in `before`.
    before = merged(MINIMAL, {} if case.path == "redis.enabled" else given)
    after = merged(merged(MINIMAL, given), nested(case.path, case.value))
    assert found(case, after) == case.expected
    if case.path != "model.hostPath":  # without it, and without a claim, nothing renders
        assert found(case, before) != case.expected


def test_every_documented_value_has_an_assertion() -> None:
    """Every key of values.yaml has a case above, and every case has a key; `test_every_setting.py` covers `app`."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    del values["app"]
    assert {leaf_of(case) for case in CASES} == set(leaves(values))
