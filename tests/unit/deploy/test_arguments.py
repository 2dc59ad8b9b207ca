"""How the application's arguments reach its replicas."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moiety.config.application import AppSettings, GatewayDeployment
from moiety.deploy.app import build, default_placement
from moiety.deploy.arguments import expert_settings, from_arguments, gateway_settings, router_settings, to_arguments
from moiety.errors import ConfigError
from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.synthetic import write_tiny

SECRET_URL = "redis://:hunter2@10.0.0.1:6390/0"
NODE = "10.0.0.7"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with 8 experts per layer."""
    return write_tiny("mixtral", tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the user's cache and registry out of the tests."""
    monkeypatch.setenv("MOIETY_CACHE", str(tmp_path))
    monkeypatch.delenv("MOIETY_REGISTRY", raising=False)


def test_a_password_does_not_travel_in_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What Ray stores and logs holds no password; a process restores the URL from its environment or a secret file."""
    settings = AppSettings(model="m", registry=SECRET_URL)
    values = to_arguments(settings)
    assert "hunter2" not in json.dumps(values)
    with pytest.raises(ConfigError, match="MOIETY_REGISTRY"):
        from_arguments(values)
    monkeypatch.setenv("MOIETY_REGISTRY", "redis://:hunter2@elsewhere:1/0")
    with pytest.raises(ConfigError, match=r"registry = 'redis://elsewhere:1/0': must be .* as Serve was given"):
        from_arguments(values)
    monkeypatch.setenv("MOIETY_REGISTRY", SECRET_URL)
    assert from_arguments(values) == settings
    monkeypatch.delenv("MOIETY_REGISTRY")
    (tmp_path / "registry").write_text(SECRET_URL + "\n")
    monkeypatch.setenv("MOIETY_SECRETS_DIR", str(tmp_path))
    assert from_arguments(values) == settings


@pytest.mark.parametrize("url", ["unix:///run/redis.sock", "rediss://h:1/0?ssl_ca_certs=/etc/ca.pem", "REDIS://h:1/0"])
def test_a_url_without_a_password_travels(url: str) -> None:
    """A registry URL that holds no secret is carried as it is, whatever its form: no process needs it in its environment."""
    assert from_arguments(to_arguments(AppSettings(model="m", registry=url))).registry.get_secret_value() == url


def test_carried_arguments_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node's MOIETY_* variables do not change the application's arguments."""
    settings = AppSettings(model="m", registry="redis://10.0.0.1:6390/0", router={"slots": 7})
    monkeypatch.setenv("MOIETY_REGISTRY", "redis://elsewhere:1/0")
    monkeypatch.setenv("MOIETY_ROUTER__SLOTS", "9")
    monkeypatch.setenv("MOIETY_OVERRIDES", '{"experts-0": {"threads": 9}}')
    carried = from_arguments(to_arguments(settings))
    assert carried == settings
    assert router_settings(carried, NODE).slots == 7


def test_loopback_stays_loopback() -> None:
    """A service on loopback does not announce the node's address; a service on all interfaces does."""
    local = AppSettings(model="m")
    assert gateway_settings(local, NODE).advertised == "127.0.0.1"
    cluster = local.model_copy(update={"listen_host": "0.0.0.0"})
    assert router_settings(cluster, NODE).advertised == NODE
    door = cluster.model_copy(update={"gateway": GatewayDeployment(listen_host="127.0.0.1")})
    assert gateway_settings(door, NODE).advertised == gateway_settings(door, NODE).listen_host == "127.0.0.1"
    assert router_settings(door, NODE).listen_host == "0.0.0.0"
    one = cluster.model_copy(update={"gateway": GatewayDeployment(listen_host="10.0.0.9")})
    assert gateway_settings(one, NODE).advertised == "10.0.0.9"  # it does not listen on another address of the node
    named = cluster.model_copy(update={"advertise_host": "pod-3.experts"})
    assert expert_settings(named, "experts-3", "0:0", NODE).advertised == "pod-3.experts"


def test_each_service_gets_its_own_settings() -> None:
    """Each gets its own section; the group's settings reach its replicas."""
    settings = AppSettings(
        model="m", gateway={"port": 50999}, router={"slots": 5}, experts={"threads": 3, "capacity": 9.5}
    )
    expert = expert_settings(settings, "experts-1", "0:4-7", NODE)
    assert (expert.threads, expert.capacity, expert.deployment) == (3, 9.5, "experts-1")
    assert router_settings(settings, NODE).slots == 5
    assert gateway_settings(settings, NODE).port == 50999


def test_a_router_knows_which_groups_may_overflow() -> None:
    """`experts.overflow` applies to every group unless `overrides` changes it."""
    settings = AppSettings(
        model="m", groups=3, overrides={"experts-1": {"overflow": "backup"}, "experts-0": {"threads": 2}}
    )
    router = router_settings(settings, NODE)
    assert [router.allows_backup(f"experts-{group}") for group in range(3)] == [False, True, False]
    others = settings.model_copy(
        update={"experts": settings.experts.model_copy(update={"overflow": "backup"}), "overrides": {}}
    )
    assert router_settings(others, NODE).allows_backup("experts-0")


def test_default_placement_covers_every_expert_once(model: Path) -> None:
    """Deployments are named experts-0, experts-1, … and hold the model's experts without overlap."""
    checkpoint = Checkpoint.open(model)
    placement = default_placement(AppSettings(model=str(model), groups=3), checkpoint)
    assert list(placement) == ["experts-0", "experts-1", "experts-2"]
    pairs = [pair for held in placement.values() for pair in held]
    whole = default_placement(AppSettings(model=str(model), groups=1), checkpoint)["experts-0"]
    assert len(pairs) == len(set(pairs)) == len(whole)


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"groups": 9}, "groups"),
        ({"grups": 2}, "grups"),
        ({"registry": "file:///run/registry.json"}, "registry"),
        ({"registry": "unix:///run/redis.sock"}, "registry"),
        ({"registry": "hunter2"}, "registry"),
        ({"experts": {"min_replicas": 5, "max_replicas": 4}}, "experts.max_replicas"),
        ({"experts": {"min_replica": 1}}, "experts.min_replica"),
    ],
)
def test_impossible_arguments_are_refused(model: Path, wrong: dict[str, object], field: str) -> None:
    """`build` raises ConfigError for an impossible argument, before anything starts."""
    with pytest.raises(ConfigError) as caught:
        build({"model": str(model), **wrong})
    assert caught.value.field == field


def test_missing_arguments_come_from_the_environment(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MOIETY_* variables fill in missing arguments, so that one config file works on different machines."""
    with pytest.raises(ConfigError, match="model"):
        build({"groups": 2})
    monkeypatch.setenv("MOIETY_MODEL", str(model))
    build({"groups": 2})
