"""Settings: where a value comes from, and how a wrong one is reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moiety.config.application import AppSettings, GroupSettings
from moiety.config.resolve import cache_dir, resolve, validated
from moiety.config.services import ExpertSettings, GatewaySettings, RouterSettings
from moiety.errors import ConfigError


@pytest.fixture(autouse=True)
def _no_environment_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes MOIETY_* variables that the user may have set."""
    for kind in (AppSettings, ExpertSettings, RouterSettings):
        for name in kind.model_fields:
            monkeypatch.delenv(f"MOIETY_{name.upper()}", raising=False)


@pytest.fixture
def yaml_file(tmp_path: Path):
    """Returns a function that writes text to a YAML file and returns its path."""

    def write(text: str) -> str:
        path = tmp_path / "settings.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_flag_beats_environment_beats_file_beats_default(yaml_file, monkeypatch: pytest.MonkeyPatch):
    """Each source applies where no stronger one gives a value; a flag of None was not given."""
    path = yaml_file("{model: /from/yaml, slots: 1, token_budget: 5, queue_limit: 1}")
    monkeypatch.setenv("MOIETY_SLOTS", "2")
    monkeypatch.setenv("MOIETY_TOKEN_BUDGET", "4")
    settings = resolve(RouterSettings, {"slots": 3, "token_budget": None}, path)
    assert (settings.slots, settings.token_budget, settings.queue_limit) == (3, 4, 1)
    assert settings.expert_wait_s == RouterSettings.model_fields["expert_wait_s"].default
    assert settings.model == "/from/yaml"


def test_other_variables_are_not_settings(monkeypatch: pytest.MonkeyPatch):
    """Only variables named after settings are read, so those of other tools have no effect."""
    monkeypatch.setenv("MOIETY_BOGUS", "1")
    monkeypatch.setenv("SLOTS", "7")
    assert resolve(RouterSettings, {"model": "m"}).slots == 32


@pytest.mark.parametrize(
    ("kind", "values", "field", "message"),
    [
        (RouterSettings, {"model": "m", "slotz": 3}, "slotz", "setting slotz = 3: Extra inputs are not permitted"),
        (RouterSettings, {"model": "m", "slots": 0}, "slots", "setting slots = 0: Input should be greater than or"),
        (RouterSettings, {"model": "m", "slots": "many"}, "slots", "setting slots = 'many': Input should be a valid"),
        (RouterSettings, {"model": "m", "dtype": "int4"}, "dtype", "must be one of auto, float32, bfloat16, float16"),
        (RouterSettings, {"model": "m", "kv_memory": "4 gobs"}, "kv_memory", "setting kv_memory = '4 gobs'"),
        (RouterSettings, {"model": "m", "port": 70000}, "port", "less than or equal to 65535"),
        (RouterSettings, {"model": "m", "app": "a b"}, "app", "setting app = 'a b'"),
        (ExpertSettings, {"model": "m", "held": "0-3"}, "held", "expected LAYERS:EXPERTS, such as 0-31:0-7"),
        (ExpertSettings, {"model": "m", "held": "0:0", "capacity": 0}, "capacity", "greater than 0"),
        (AppSettings, {"model": "m", "experts": {"min": 1}}, "experts.min", "Extra inputs are not permitted"),
        (AppSettings, {"model": "m", "experts": {"target_busy": 2}}, "experts.target_busy", "less than or equal to 1"),
    ],
)
def test_a_wrong_setting_is_reported_by_name_value_and_bound(
    kind: Any, values: dict[str, Any], field: str, message: str
):
    """ConfigError names the field (a nested one by its path), the value and the bound."""
    with pytest.raises(ConfigError) as refused:
        validated(kind, values)
    assert refused.value.field == field
    assert message in str(refused.value)


def test_a_missing_setting_is_reported_without_the_others():
    """The error names the missing setting and shows no other setting, such as a URL with a secret."""
    with pytest.raises(ConfigError, match="setting model = None: Field required") as refused:
        resolve(RouterSettings, {"registry": "redis://:secret@host"})
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"), [("- a\n- b", "must hold a mapping"), ("a: [", "cannot be read"), ("", "must hold a mapping")]
)
def test_a_bad_file_is_reported_with_its_path(yaml_file, text: str, message: str):
    """A file that is not a mapping, or not YAML, raises ConfigError, which names it."""
    path = yaml_file(text)
    with pytest.raises(ConfigError, match=message) as refused:
        resolve(RouterSettings, {"model": "m"}, path)
    assert path in str(refused.value) or len(path) > 80


def test_a_missing_file_is_reported(tmp_path: Path):
    """A path that does not exist raises ConfigError."""
    with pytest.raises(ConfigError, match="cannot be read"):
        resolve(RouterSettings, {"model": "m"}, str(tmp_path / "none.yaml"))


def test_settings_are_frozen_and_unknown_keys_of_a_file_are_refused(yaml_file):
    """An unknown key in a file raises ConfigError, and a setting cannot be changed afterwards."""
    with pytest.raises(ConfigError, match="slotz"):
        resolve(RouterSettings, {"model": "m"}, yaml_file("slotz: 3"))
    settings = resolve(RouterSettings, {"model": "m"})
    with pytest.raises(ValueError, match="frozen"):
        settings.slots = 1


def test_sizes_names_and_experts_are_read_as_people_write_them(monkeypatch: pytest.MonkeyPatch):
    """4GiB is a size, the folder's name is the model's name, and experts are kept in their canonical form."""
    monkeypatch.setenv("MOIETY_KV_MEMORY", "4GiB")
    settings = resolve(RouterSettings, {"model": "/models/Mixtral"})
    assert settings.kv_memory == 4 << 30
    assert settings.name == "Mixtral"
    assert settings.advertised == settings.listen_host == "127.0.0.1"
    named = resolve(GatewaySettings, {"model": "/m", "served_name": "mine", "advertise_host": "10.0.0.1"})
    assert (named.name, named.advertised) == ("mine", "10.0.0.1")
    assert resolve(ExpertSettings, {"model": "m", "held": "1:0 ; 0:0"}).held == "0-1:0"
    assert resolve(AppSettings, {"model": "m"}).experts == GroupSettings()


def test_the_cache_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The cache folder is $MOIETY_CACHE, else a folder in the home folder."""
    monkeypatch.setenv("MOIETY_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("MOIETY_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "moiety"


def test_a_deployment_may_differ_from_the_others() -> None:
    """`overrides` changes only what it names, for one deployment; an impossible change is refused with that name."""
    settings = AppSettings(
        model="m", experts=GroupSettings(max_replicas=4), overrides={"experts-1": {"max_replicas": 9}}
    )
    assert (settings.group("experts-0").max_replicas, settings.group("experts-1").max_replicas) == (4, 9)
    assert settings.group("experts-1").target_busy == settings.experts.target_busy
    with pytest.raises(ConfigError, match=r"experts-1: .*max_replicas.* must be at least min_replicas"):
        resolve(AppSettings, {"model": "m", "overrides": {"experts-1": {"min_replicas": 5}}})


def test_overflow_is_set_per_group() -> None:
    """`overflow` is for groups only, cannot change while they run, and excludes `deterministic`."""
    overrides = {"experts-1": {"overflow": "backup"}}
    assert resolve(AppSettings, {"model": "m", "overrides": overrides}).group("experts-1").overflow == "backup"
    with pytest.raises(ConfigError, match=r"hot-0: overflow is for groups"):
        resolve(AppSettings, {"model": "m", "overrides": {"hot-0": {"overflow": "backup"}}})
    with pytest.raises(ConfigError, match=r"experts-1: .*overflow.*'wait' or 'backup'"):
        resolve(AppSettings, {"model": "m", "overrides": {"experts-1": {"overflow": "drop"}}})
    with pytest.raises(ConfigError, match=r"overflow_groups.* not possible with deterministic"):
        resolve(RouterSettings, {"model": "m", "deterministic": True, "overflow_groups": {"experts-1": "backup"}})
    assert not resolve(RouterSettings, {"model": "m", "overflow_groups": {"experts-1": "wait"}}).may_overflow
    with pytest.raises(ConfigError, match=r"user_config\.overflow"):
        # routers get it at start: they refuse models without backup experts
        GroupSettings().with_live({"overflow": "backup"})


def test_live_settings_of_a_group() -> None:
    """A live setting changes only itself; any other setting, or a bad value, is refused."""
    group = GroupSettings(target_busy=0.5, max_replicas=7)
    assert group.with_live({}) is group
    assert group.with_live({"target_busy": 0.9}) == group.model_copy(update={"target_busy": 0.9})
    with pytest.raises(ConfigError, match=r"user_config\.num_cpus = 2: live settings are target_busy"):
        group.with_live({"num_cpus": 2})
    with pytest.raises(ConfigError, match="target_busy"):
        group.with_live({"target_busy": 1.5})
