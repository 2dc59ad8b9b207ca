"""Settings of single deployments: what differs from those of all, and what may change while they run."""

from __future__ import annotations

import pytest

from moiety.config.application import AppSettings, ExpertDeployment
from moiety.config.options import Scaling, SystemOptions
from moiety.config.resolve import resolve
from moiety.config.services import ExpertSettings, RouterSettings
from moiety.config.validate import validated
from moiety.errors import ConfigError


def test_a_deployment_may_differ_from_the_others() -> None:
    """`overrides` changes only what it names, for one deployment; an impossible change is refused with that name."""
    settings = AppSettings(
        model="m", experts=ExpertDeployment(max_replicas=4), overrides={"experts-1": {"max_replicas": 9}}
    )
    assert (settings.group("experts-0").max_replicas, settings.group("experts-1").max_replicas) == (4, 9)
    assert settings.group("experts-1").target_busy == settings.experts.target_busy
    with pytest.raises(ConfigError, match=r"overrides\.experts-1\.max_replicas = 4: must be at least min_replicas"):
        resolve({"model": "m", "overrides": {"experts-1": {"min_replicas": 5}}})


def test_a_hot_set_may_have_fewer_replicas_than_a_group() -> None:
    """A hot set may scale to zero unless its entry says otherwise, so the fewest replicas of groups do not bind it."""
    given = {"model": "m", "hot_sets": 1, "experts": {"min_replicas": 2}, "overrides": {"hot-0": {"max_replicas": 1}}}
    hot = resolve(given).group("hot-0")
    assert (hot.min_replicas, hot.max_replicas) == (0, 1)


@pytest.mark.parametrize("name", ["experts-2", "hot-1", "expert-1", "experts-01", "router"])
def test_overrides_are_for_what_exists(name: str) -> None:
    """A name of `overrides` that no expert group or hot set has is refused with the names there are."""
    known = "there are experts-0 to experts-1, hot-0 to hot-0$"
    with pytest.raises(ConfigError, match=f"{name}: no such expert group or hot set; {known}"):
        resolve({"model": "m", "groups": 2, "hot_sets": 1, "overrides": {name: {"max_replicas": 2}}})


def test_overflow_is_set_per_group() -> None:
    """`overflow` is for groups only, cannot change while they run, and excludes `deterministic`."""
    overrides = {"experts-1": {"overflow": "backup"}}
    assert resolve({"model": "m", "overrides": overrides}).group("experts-1").overflow == "backup"
    with pytest.raises(ConfigError, match=r"overrides\.hot-0\.overflow = 'backup': is for groups"):
        resolve({"model": "m", "hot_sets": 1, "overrides": {"hot-0": {"overflow": "backup"}}})
    with pytest.raises(ConfigError, match=r"overrides\.experts-1\.overflow = 'drop': must be wait or backup"):
        resolve({"model": "m", "overrides": {"experts-1": {"overflow": "drop"}}})
    with pytest.raises(ConfigError, match=r"overflow_groups.* not possible with deterministic"):
        validated(RouterSettings, {"model": "m", "deterministic": True, "overflow_groups": {"experts-1": "backup"}})
    assert not validated(RouterSettings, {"model": "m", "overflow_groups": {"experts-1": "wait"}}).may_overflow
    with pytest.raises(ConfigError, match=r"user_config\.overflow"):
        # routers get it at start: they refuse models without backup experts
        Scaling().with_live({"overflow": "backup"})


@pytest.mark.parametrize("kind", [ExpertSettings, RouterSettings, AppSettings])
def test_deterministic_is_for_cpu(kind: type[SystemOptions]) -> None:
    """Services and the application refuse `deterministic` on cuda, where nothing keeps it."""
    values = {"model": "m", "device": "cuda", **({"held": "0:0"} if kind is ExpertSettings else {})}
    assert validated(kind, values).device == "cuda"
    with pytest.raises(ConfigError, match="deterministic = true: needs device cpu until"):
        validated(kind, {**values, "deterministic": True})


def test_live_settings_of_a_group() -> None:
    """A live setting changes only itself; any other setting, or a bad value, is refused."""
    group = Scaling(target_busy=0.5, max_replicas=7)
    assert group.with_live({}) is group
    assert group.with_live({"target_busy": 0.9}) == group.model_copy(update={"target_busy": 0.9})
    with pytest.raises(ConfigError, match=r"user_config\.num_cpus = 2: live settings are target_busy"):
        group.with_live({"num_cpus": 2})
    with pytest.raises(ConfigError, match="target_busy"):
        group.with_live({"target_busy": 1.5})


@pytest.mark.parametrize(
    ("resources", "why"),
    [
        ({"CPU": 1}, "CPU: set num_cpus"),
        ({"gpu": 1}, "gpu: set num_gpus"),
        ({"memory": 1e9}, "memory: not offered"),
        ({"rack": 0}, "must be a number above 0"),
        ({"rack": 1.5}, "rack: 1.5: must be a whole number"),
    ],
)
def test_resources_are_what_ray_takes(resources: dict[str, float], why: str) -> None:
    """A resource that Ray reserves by another option, or a quantity that it refuses, is refused with what to do instead."""
    with pytest.raises(ConfigError, match=rf"experts\.resources.*{why}"):
        resolve({"model": "m", "experts": {"resources": resources}})
    assert resolve({"model": "m", "experts": {"resources": {"rack": 0.5}}}).experts.resources == {"rack": 0.5}
