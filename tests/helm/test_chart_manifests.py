"""The chart lints, and Kubernetes and KubeRay accept what it renders; mutations prove that the checks can fail."""

from __future__ import annotations

import copy
import json
import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helm_python
import jsonschema
import kubernetes_validate
import pytest
import yaml
from rendering import CHART, EVERYTHING, MINIMAL, Manifest, dig, manifests, merged, named, nested, templates

from moiety.cli.generate import generate

KUBERNETES = "1.32"
CRD_VARIABLE = "MOIETY_RAYSERVICE_CRD"
POD = "spec/rayClusterConfig/workerGroupSpecs/0/template/spec"
HEAD_POD = "spec/rayClusterConfig/headGroupSpec/template/spec"
GROUP = {"name": "gpus", "replicas": 1, "minReplicas": 0, "maxReplicas": 2, "resources": {}}


def as_objects(document: Manifest) -> list[Manifest]:
    """Returns `document`, or for a RayService the Pods and the Service that it describes."""
    if document["kind"] != "RayService":
        return [document]
    cluster = document["spec"]["rayClusterConfig"]
    templates_of_pods = [cluster["headGroupSpec"]["template"], *(g["template"] for g in cluster["workerGroupSpecs"])]
    pods = [{"apiVersion": "v1", "kind": "Pod", **template} for template in templates_of_pods]
    return [*pods, {"apiVersion": "v1", "kind": "Service", **document["spec"]["serveService"]}]


def rayservice(values: dict[str, Any] = MINIMAL) -> Manifest:
    """Returns the RayService that the chart renders."""
    document = named(manifests(values), "RayService")
    assert document is not None
    return document


def small_schema() -> dict[str, Any]:
    """Returns a handwritten schema of the fields that the chart uses."""
    schema: dict[str, Any] = json.loads(Path(__file__).with_name("rayservice.schema.json").read_text())
    return schema


def crd_schema() -> dict[str, Any]:
    """Returns KubeRay's schema of a RayService, closed, as JSON Schema; skips the test if there is no CRD file."""
    path = os.environ.get(CRD_VARIABLE)
    if not path:
        pytest.skip(f"{CRD_VARIABLE} does not name KubeRay's ray.io_rayservices.yaml")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    versions = yaml.load(Path(path).read_text(), Loader=loader)["spec"]["versions"]
    schema = next(version for version in versions if version["name"] == "v1")["schema"]["openAPIV3Schema"]
    converted: dict[str, Any] = closed(schema)
    converted["properties"]["metadata"] = {"type": "object"}
    return converted


def closed(schema: Any) -> Any:
    """Returns an OpenAPI v3 schema as JSON Schema that refuses unknown fields, like a strict API server."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    dropped = ("format", "description", "default", "example", "nullable")
    out = {key: value for key, value in schema.items() if key not in dropped and not key.startswith("x-kubernetes")}
    if "properties" in out:
        out["properties"] = {name: closed(below) for name, below in out["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            out.setdefault("additionalProperties", False)
    for key in ("items", "additionalProperties", "allOf", "anyOf", "oneOf"):
        if key in out:
            out[key] = closed(out[key])
    if schema.get("x-kubernetes-int-or-string"):
        out.pop("type", None)
        out["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    return out


@pytest.mark.parametrize("values", [MINIMAL, EVERYTHING], ids=["minimal", "everything"])
def test_the_chart_lints(values: dict[str, Any]) -> None:
    """Helm's strict lint reports nothing."""
    assert helm_python.lint(CHART, values, strict=True)["messages"] == []


@pytest.mark.parametrize("values", [MINIMAL, EVERYTHING], ids=["minimal", "everything"])
def test_kubernetes_accepts_every_object(values: dict[str, Any]) -> None:
    """Each built-in object, and each Pod and Service in the RayService, fits Kubernetes' schema without unknown keys."""
    for document in manifests(values):
        for built_in in as_objects(document):
            kubernetes_validate.validate(built_in, KUBERNETES, strict=True)


def test_the_kubernetes_check_can_fail() -> None:
    """A misspelt key in a worker's container is refused."""
    pod = as_objects(rayservice())[1]
    pod["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@pytest.mark.parametrize("schema", [small_schema, crd_schema], ids=["fields in use", "KubeRay's CRD"])
def test_kuberay_accepts_the_rayservice(schema: Callable[[], dict[str, Any]]) -> None:
    """The RayService fits the schema; a misspelt, a missing and a mistyped field are refused."""
    validator = jsonschema.Draft202012Validator(schema())
    for values in (MINIMAL, EVERYTHING):
        assert list(validator.iter_errors(rayservice(values))) == []
    broken = copy.deepcopy(rayservice())
    group = broken["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    group["minReplica"] = 1
    del group["groupName"]
    broken["spec"]["rayClusterConfig"]["enableInTreeAutoscaling"] = "yes"
    assert {error.validator for error in validator.iter_errors(broken)} == {"additionalProperties", "required", "type"}


def test_pods_have_no_privileges() -> None:
    """No container runs as root, escalates, or keeps a capability."""
    pods = [doc["spec"]["template"]["spec"] for doc in manifests(EVERYTHING) if doc["kind"] == "Deployment"]
    pods += [pod["spec"] for pod in as_objects(rayservice(EVERYTHING)) if pod["kind"] == "Pod"]
    assert len(pods) == 4
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]


def test_a_worker_is_ready_when_its_gateway_is() -> None:
    """The probe, the container, the Service and the application's argument use the same port."""
    document = rayservice(merged(MINIMAL, nested("app.gateway.port", 50052)))
    container = dig(document, f"{POD}/containers/0")
    port = dig(document, "spec/serveService/spec/ports/0")
    arguments = yaml.safe_load(document["spec"]["serveConfigV2"])["applications"][0]["args"]
    assert container["readinessProbe"]["grpc"]["port"] == 50052
    assert (
        container["ports"][0]["containerPort"]
        == port["port"]
        == port["targetPort"]
        == arguments["gateway"]["port"]
        == 50052
    )
    assert port["name"] == "serve"


def test_pods_wait_longer_than_running_requests_may_take() -> None:
    """Kubernetes gives every Ray pod longer than Ray waits, and Ray longer than `drain_s`."""
    document = rayservice(merged(MINIMAL, nested("app.drain_s", 900.5)))
    for pod in (dig(document, POD), dig(document, HEAD_POD)):
        variables = {each["name"]: each.get("value") for each in pod["containers"][0]["env"]}
        ray_s = int(variables["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert 900.5 < ray_s < pod["terminationGracePeriodSeconds"] < 1000


def test_the_http_api_has_a_service_of_its_own() -> None:
    """The container, the Service and the application's argument use one port, since KubeRay keeps a single one in its own."""
    values = merged(MINIMAL, nested("app.gateway.http_port", 50082))
    annotated = merged(values, nested("gateway", {"serviceType": "NodePort", "httpServiceAnnotations": {"a": "b"}}))
    service = named(manifests(annotated), "Service", "-http")
    assert service is not None
    (port,) = service["spec"]["ports"]
    assert (port["name"], port["port"], port["appProtocol"]) == ("http", 50082, "http")
    assert (service["spec"]["type"], service["metadata"]["annotations"]) == ("NodePort", {"a": "b"})
    document = rayservice(annotated)
    ports = {one["name"]: one["containerPort"] for one in dig(document, f"{POD}/containers/0/ports")}
    assert ports[port["targetPort"]] == 50082
    arguments = yaml.safe_load(document["spec"]["serveConfigV2"])["applications"][0]["args"]
    assert arguments["gateway"]["http_port"] == 50082
    labels = dig(document, "spec/rayClusterConfig/workerGroupSpecs/0/template/metadata/labels")
    assert service["spec"]["selector"].items() <= labels.items()
    head = dig(document, "spec/rayClusterConfig/headGroupSpec/template/metadata/labels")
    assert not service["spec"]["selector"].items() <= head.items()
    assert [one["name"] for one in dig(document, "spec/serveService/spec/ports")] == ["serve"]


def test_without_the_http_api_nothing_of_it_is_there() -> None:
    """With app.gateway.http off, the chart has no Service, no container port, no open port and no note of it."""
    values = merged(EVERYTHING, nested("app.gateway.http", False))
    documents = manifests(values)
    assert named(documents, "Service", "-http") is None
    assert [port["name"] for port in dig(rayservice(values), f"{POD}/containers/0/ports")] == ["grpc"]
    policy = named(documents, "NetworkPolicy", "-gateway")
    assert [port["port"] for port in dig(policy, "spec/ingress/0/ports")] == [50051]
    assert "curl" not in templates(values)["moiety/templates/NOTES.txt"]
    policy = named(manifests(EVERYTHING), "NetworkPolicy", "-gateway")
    assert [port["port"] for port in dig(policy, "spec/ingress/0/ports")] == [50051, 50080]


def test_service_links_are_off() -> None:
    """Kubernetes injects no <SERVICE>_PORT variables: in a release named `moiety` they would be read as settings."""
    document = rayservice()
    assert dig(document, f"{POD}/enableServiceLinks") is False
    assert dig(document, f"{HEAD_POD}/enableServiceLinks") is False


def test_a_password_stays_in_its_secret() -> None:
    """The Ray pods and Redis take the password from the Secret; no object holds it, the URL only refers to it."""
    documents = manifests(EVERYTHING)
    environment = {item["name"]: item for item in dig(rayservice(EVERYTHING), f"{POD}/containers/0/env")}
    assert environment["MOIETY_REGISTRY"]["value"] == "redis://:$(REDIS_PASSWORD)@rel-moiety-redis:6379/0"
    assert environment["REDIS_PASSWORD"]["valueFrom"]["secretKeyRef"] == {"name": "redis-password", "key": "password"}
    assert all(document["kind"] != "Secret" for document in documents)


def test_redis_reads_its_password_from_stdin(tmp_path: Path) -> None:
    """The container's command passes the password through stdin, not as an argument, which others could see."""
    deployment = named(manifests(EVERYTHING), "Deployment", "-redis")
    server = tmp_path / "redis-server"
    server.write_text('#!/bin/sh\necho "arguments: $*"; cat\n')
    server.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "REDIS_PASSWORD": "s3cret"}
    command = dig(deployment, "spec/template/spec/containers/0/command")
    output = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=10, check=True).stdout
    assert output.splitlines() == ["arguments: -", 'save ""', "requirepass s3cret"]


def test_several_worker_groups() -> None:
    """Each item of ray.workerGroups becomes a worker group, and optional keys may be left out."""
    groups = rayservice(merged(MINIMAL, nested("ray.workerGroups", [{**GROUP, "name": "cpus"}, GROUP])))
    assert [g["groupName"] for g in groups["spec"]["rayClusterConfig"]["workerGroupSpecs"]] == ["cpus", "gpus"]


def test_names_carry_the_release() -> None:
    """Two releases in one namespace share no object, and a release named moiety does not repeat the name."""
    first = {(doc["kind"], doc["metadata"]["name"]) for doc in manifests(EVERYTHING, "one")}
    second = {(doc["kind"], doc["metadata"]["name"]) for doc in manifests(EVERYTHING, "two")}
    assert not first & second
    assert named(manifests(MINIMAL, "moiety"), "RayService")["metadata"]["name"] == "moiety"  # type: ignore[index]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (merged(MINIMAL, nested("image.repository", "")), "no image is published"),
        (merged(MINIMAL, nested("model.existingClaim", "")), "model.existingClaim or model.hostPath is required"),
        (merged(MINIMAL, nested("model.hostPath", "/srv")), "give one of the two"),
        (merged(MINIMAL, nested("redis.enabled", False)), "set redis.external.url"),
    ],
    ids=["no image", "no model", "two models", "no Redis"],
)
def test_missing_values_are_named(values: dict[str, Any], message: str) -> None:
    """Values that cannot work are refused, and the message names the keys to set."""
    with pytest.raises(helm_python.HelmError, match=message):
        templates(values)


def test_the_notes_name_what_was_installed() -> None:
    """The commands in NOTES.txt have this release's names and port."""
    notes = templates(merged(MINIMAL, nested("app.gateway.port", 50052)))["moiety/templates/NOTES.txt"]
    assert "kubectl -n ns port-forward service/rel-moiety-gateway 50052" in notes
    assert "kubectl -n ns wait rayservice/rel-moiety --for=condition=Ready" in notes
    command = next(line.split("moiety generate ")[1] for line in notes.splitlines() if "moiety generate" in line)
    parsed = generate.make_context("generate", shlex.split(command)).params
    assert parsed["address"] == "127.0.0.1:50052"
    assert "port-forward service/rel-moiety-http 50080" in notes
    assert "curl http://127.0.0.1:50080/v1/models" in notes
