"""Checks serve.yaml and serve-gpu.yaml against Serve's own schema and the application's settings."""

from __future__ import annotations

import pytest
from cluster_files import LoggingConfig, ServeApplicationSchema, ServeDeploySchema, load

from moiety.config.resolve import resolve

SERVE_FILES = ["serve.yaml", "serve-gpu.yaml"]


@pytest.mark.parametrize("name", SERVE_FILES)
def test_serve_accepts_the_deploy_file(name: str) -> None:
    """Serve's schema accepts the file; its application is Moiety's, and Serve's proxies are disabled."""
    schema = ServeDeploySchema.model_validate(load(name))
    assert [application.import_path for application in schema.applications] == ["moiety.deploy.app:build"]
    assert str(schema.proxy_location.value) == "Disabled"


@pytest.mark.parametrize("name", SERVE_FILES)
def test_the_arguments_are_settings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arguments and MOIETY_MODEL are complete; an argument wins over its variable."""
    arguments = load(name)["applications"][0]["args"]
    monkeypatch.setenv("MOIETY_MODEL", "/models/mixtral")
    monkeypatch.setenv("MOIETY_GROUPS", "7")
    settings = resolve(arguments)
    assert (settings.model, settings.groups) == ("/models/mixtral", arguments["groups"])
    assert (settings.device == "cuda") == (settings.experts.num_gpus > 0) == (settings.router.num_gpus > 0)


@pytest.mark.parametrize("name", SERVE_FILES)
def test_every_key_is_one_of_serves(name: str) -> None:
    """Every key is one that Serve knows, because Serve ignores unknown keys."""
    config = load(name)
    assert set(config) <= set(ServeDeploySchema.model_fields)
    assert set(config["logging_config"]) <= set(LoggingConfig.model_fields)
    for application in config["applications"]:
        assert set(application) <= set(ServeApplicationSchema.model_fields)


@pytest.mark.parametrize("name", SERVE_FILES)
def test_the_gateway_is_on_the_head(name: str) -> None:
    """The gateway is placed on the head, also where the head has no CPU for replicas, so that its address is known."""
    gateway = resolve({"model": "m", **load(name)["applications"][0]["args"]}).gateway
    assert (gateway.num_cpus, gateway.num_gpus) == (0, 0)
    assert set(gateway.resources) == {"node:__internal_head__"}


def test_two_cores_are_enough() -> None:
    """The first replicas of serve.yaml, and another one of a group, reserve no more than 2 CPUs."""
    settings = resolve({"model": "m", **load("serve.yaml")["applications"][0]["args"]})
    deployments = ["gateway", "router", *(f"experts-{group}" for group in range(settings.groups))]
    scaling = [settings.scaling(name) for name in deployments]
    assert sum(each.min_replicas * each.num_cpus for each in scaling) + settings.experts.num_cpus <= 2


def test_serves_check_can_fail() -> None:
    """A mistyped value of the deploy file is refused."""
    with pytest.raises(ValueError, match="proxy_location"):
        ServeDeploySchema.model_validate(load("serve.yaml") | {"proxy_location": "Nowhere"})
