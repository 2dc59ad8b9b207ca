"""Every setting reaches its service: from the command line, from Serve's arguments, and from the chart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from app_settings import ELSEWHERE
from pydantic import Secret
from rendering import MINIMAL, dig, leaves, manifests, merged, named

from moiety.cli.serve import read_settings, serve
from moiety.config.application import AppSettings
from moiety.config.options import SystemOptions
from moiety.config.resolve import nested, resolve
from moiety.config.validate import leaves as settings_of
from moiety.core.replica import Transport
from moiety.deploy.arguments import expert_settings, from_arguments, gateway_settings, router_settings, to_arguments

NODE = "10.0.0.7"
SCALING = {
    "min_replicas": 2,
    "max_replicas": 7,
    "num_cpus": 2.5,
    "num_gpus": 0.5,
    "resources": {"node:__internal_head__": 0.001},
    "target_busy": 0.5,
    "queue_wait_ms": 20.0,
    "shrink_after_s": 60.0,
    "shrink_margin": 0.9,
}
# A valid value of every setting that is not its default. A new setting needs a value here.
SAMPLE: dict[str, Any] = {
    "app": "chat",
    "model": "/models/mixtral",
    "cluster": "blue",
    "revision": "0123456789abcdef" * 2,
    "verify": "full",
    "served_name": "mixtral",
    "registry": "redis://cache.example.com:6379/0",
    "listen_host": "::",
    "advertise_host": "pod.example.com",
    "dtype": "bfloat16",
    "device": "cuda",
    "deterministic": True,
    "slices": 2,
    "drain_s": 20.0,
    "groups": 4,
    "hot_sets": 3,
    "hot_memory": 4 << 30,
    "rebalance_gain": 0.3,
    "rebalance_layers": 4,
    "router": {
        **SCALING,
        "threads": 6,
        "slots": 64,
        "token_budget": 384,
        "max_context": 4096,
        "kv_memory": 8 << 30,
        "block_tokens": 32,
        "prefix_cache": False,
        "speculative_tokens": 3,
        "queue_limit": 99,
        "expert_wait_s": 10.0,
        "hedge_after_s": 0.1,
        "retry_budget": 0.3,
        "overflow_queue_ms": 25.0,
        "lanes": 2,
        "transport": Transport.GRPC,
    },
    "gateway": {
        **SCALING,
        "port": 50052,
        "http": False,
        "http_port": 50082,
        "max_concurrent": 77,
        "router_wait_s": 12.0,
        "tool_format": "hermes",
        "skip_tokenizer": True,
        "max_connection_age_s": 120.0,
        "max_connection_age_grace_s": 900.0,
        "listen_host": "10.1.1.1",
    },
    "experts": {
        **SCALING,
        "threads": 3,
        "weights": "int8",
        "capacity": 1000.0,
        "queue_calls": 33,
        "overflow": "backup",
    },
    "overrides": {"experts-1": {"max_replicas": 9}, "hot-2": {"max_replicas": 8}},
}
NAMES = [name for name, _ in settings_of(AppSettings)]


def sample(name: str) -> Any:
    """Returns the sample's value of the setting `name`."""
    return dig(SAMPLE, name.replace(".", "/"))


def written(value: Any) -> Any:
    """Returns `value` as one writes it in YAML. Sizes get a unit, because Helm makes floats of large integers."""
    if isinstance(value, dict):
        return {name: written(below) for name, below in value.items()}
    if isinstance(value, int) and value >= 1 << 30:
        return f"{value >> 30}GiB"
    return value.value if isinstance(value, Transport) else value


def needed(name: str) -> dict[str, Any]:
    """Returns what must be given beside the setting `name`, so that its value in the sample is possible."""
    section, _, field = name.rpartition(".")
    return nested(f"{section}.max_replicas", 7) if field == "min_replicas" else {"groups": 4, "hot_sets": 3}


def received(settings: AppSettings, name: str) -> list[Any]:
    """Returns the value of the setting `name` in every process that uses it, after the way through Ray."""
    settings = from_arguments(to_arguments(settings))
    services = {
        "router": router_settings(settings, NODE),
        "gateway": gateway_settings(settings, NODE),
        "experts": expert_settings(settings, "experts-3", "0:0", NODE),
    }
    section, _, field = name.rpartition(".")
    if name == "overrides":
        values = [{key: {"max_replicas": settings.group(key).max_replicas} for key in settings.overrides}]
    elif name == "experts.overflow":  # routers act on it
        values = [services["router"].overflow]
    elif section:
        of_the_service = field in type(services[section]).model_fields
        values = [getattr(services[section] if of_the_service else settings.scaling(section), field)]
    elif field in SystemOptions.model_fields:
        # the gateway has a listen_host of its own
        users = [service for service in services if (service, field) != ("gateway", "listen_host")]
        values = [getattr(services[service], field) for service in users]
    else:  # used where the application is built, or by the autoscaler
        values = [getattr(settings, field)]
    return [value.get_secret_value() if isinstance(value, Secret) else value for value in values]


def assert_arrived(settings: AppSettings, name: str) -> None:
    """Asserts that every process that uses the setting `name` has the sample's value, and would have another by default."""
    values = received(settings, name)
    assert values == [sample(name)] * len(values), name
    assert values != received(AppSettings(model="default"), name), f"{name}: the sample is the default"


def test_the_sample_names_every_setting() -> None:
    """The settings that the tests below set are all that there are."""
    assert set(leaves({**SAMPLE, "overrides": ""})) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_command_line_sets_it(name: str, tmp_path: Path) -> None:
    """`moiety serve --set NAME=VALUE` sets it."""
    values = [(key, dig(needed(name), key.replace(".", "/"))) for key in leaves(needed(name))] + [(name, sample(name))]
    words = [f"--set={key}={json.dumps(written(value))}" for key, value in values]
    options = serve.make_context("serve", [str(tmp_path), *words]).params
    assert_arrived(read_settings(**{key: options[key] for key in options.keys() - {"ray_address", "dashboard"}}), name)


@pytest.mark.parametrize("name", NAMES)
def test_serves_arguments_set_it(name: str) -> None:
    """An argument of the Serve application sets it."""
    given = merged({"model": "m", **needed(name)}, nested(name, written(sample(name))))
    assert_arrived(resolve(given), name)


@pytest.mark.parametrize("left_out", [["deterministic"], ["experts.overflow", "device"]])
def test_the_chart_sets_all(left_out: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The chart's values set all at once: the checkpoint by `model`, the registry by `redis`, all others by `app`.

    `deterministic` and the settings that exclude it take turns.
    """
    values = {
        **MINIMAL,
        "model": {"hostPath": "/srv", "folder": "mixtral"},
        "redis": {"enabled": False, "external": {"url": SAMPLE["registry"]}},
        "app": {name: written(value) for name, value in SAMPLE.items() if name not in ELSEWHERE},
    }
    for name in left_out:
        default = dig(AppSettings(model="m").model_dump(), name.replace(".", "/"))
        values["app"] = merged(values["app"], nested(name, default))
    document = named(manifests(values), "RayService")
    environment = dig(document, "spec/rayClusterConfig/workerGroupSpecs/0/template/spec/containers/0/env")
    for variable in environment:
        monkeypatch.setenv(variable["name"], variable["value"])
    settings = resolve(yaml.safe_load(dig(document, "spec/serveConfigV2"))["applications"][0]["args"])
    for name in NAMES:
        if name not in left_out:
            assert_arrived(settings, name)
