"""Settings: where a value comes from, and how a wrong one is reported."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import pytest

from moiety.config.application import AppSettings, ExpertDeployment
from moiety.config.cache_folder import cache_dir
from moiety.config.resolve import resolve
from moiety.config.services import ExpertSettings, GatewaySettings, RouterSettings
from moiety.config.validate import validated
from moiety.errors import ConfigError

HOLDS_ITSELF: dict[str, Any] = {}
HOLDS_ITSELF["a"] = HOLDS_ITSELF
URL = "redis://:hunter2@cache.example.com:6379/0"


@pytest.fixture
def yaml_file(tmp_path: Path):
    """Returns a function that writes text to a YAML file and returns its path."""

    def write(text: str) -> str:
        path = tmp_path / "settings.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_flag_beats_environment_beats_secret_file_beats_file_beats_default(
    yaml_file, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Each source applies, setting by setting, where no stronger one gives a value."""
    path = yaml_file("{app: yaml, served_name: yaml, groups: 3, router: {slots: 1, token_budget: 5, queue_limit: 1}}")
    (tmp_path / "app").write_text("secret\n")
    (tmp_path / "served_name").write_text("secret")
    monkeypatch.setenv("MOIETY_SECRETS_DIR", str(tmp_path))
    monkeypatch.setenv("MOIETY_APP", "environment")
    monkeypatch.setenv("MOIETY_ROUTER__SLOTS", "2")
    monkeypatch.setenv("MOIETY_ROUTER__TOKEN_BUDGET", "4")
    settings = resolve({"model": "m", "router": {"slots": 3}}, path)
    router = settings.router
    assert (router.slots, router.token_budget, router.queue_limit) == (3, 4, 1)
    assert (settings.app, settings.served_name, settings.groups) == ("environment", "secret", 3)
    assert router.expert_wait_s == RouterSettings.model_fields["expert_wait_s"].default


def test_other_variables_are_not_settings(monkeypatch: pytest.MonkeyPatch):
    """Only variables named after settings are read, so those of other tools have no effect."""
    monkeypatch.setenv("MOIETY_BOGUS", "1")
    monkeypatch.setenv("ROUTER__SLOTS", "7")
    assert resolve({"model": "m"}).router.slots == 32


@pytest.mark.parametrize(
    ("variable", "value", "meant"),
    [
        ("MOIETY_SLOTS", "64", "MOIETY_ROUTER__SLOTS"),
        ("MOIETY_ROUTER_SLOTS", "64", "MOIETY_ROUTER__SLOTS"),
        ("MOIETY_REGISTRI", "redis://h", "MOIETY_REGISTRY"),
        ("MOIETY_PORT", "tcp://10.0.0.1:50051", None),  # Kubernetes sets it in pods beside a Service called moiety
        ("MOIETY_CPU_KERNELS", "off", None),  # read elsewhere
        ("MOIETY_SERVICE_HOST", "10.0.0.1", None),  # from Kubernetes too
    ],
)
def test_a_variable_that_resembles_a_setting_is_warned_of(
    variable: str,
    value: str,
    meant: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    """It has no effect, and a warning names the setting that may be meant."""
    monkeypatch.setenv(variable, value)
    assert resolve({"model": "m"}) == AppSettings(model="m")
    assert caplog.messages == ([f"{variable} is not read; did you mean {meant}?"] if meant else [])


def test_an_empty_secret_file_counts_as_unset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As an empty variable does."""
    (tmp_path / "app").write_text("\n")
    monkeypatch.setenv("MOIETY_SECRETS_DIR", str(tmp_path))
    assert resolve({"model": "m"}).app == "moiety"


def test_a_secret_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Not a variable of the same section, which is right."""
    (tmp_path / "router").write_text("slots")
    monkeypatch.setenv("MOIETY_SECRETS_DIR", str(tmp_path))
    monkeypatch.setenv("MOIETY_ROUTER__LANES", "2")
    with pytest.raises(ConfigError, match="setting router: the secret file router must be JSON"):
        resolve({"model": "m"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"app: \xff", "cannot be read"),
        (b"router.slots: 5", r"router\.slots: unknown with a dot: write router: \{slots: …\}"),
    ],
)
def test_a_file_that_is_no_list_of_settings_is_reported(content: bytes, message: str, tmp_path: Path):
    """Bytes that are no text, and dots instead of nesting."""
    (tmp_path / "settings.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        resolve({"model": "m"}, str(tmp_path / "settings.yaml"))


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        (
            "MOIETY_ROUTER__SLOTZ",
            "1",
            r"router\.slotz: unknown; did you mean router\.slots\? \(from MOIETY_ROUTER__SLOTZ\)",
        ),
        ("MOIETY_ROUTER", "slots", "setting router: MOIETY_ROUTER must be JSON"),
        ("MOIETY_EXPERTS__RESOURCES", "slots", "setting experts: MOIETY_EXPERTS__RESOURCES must be JSON"),
        ("MOIETY_ROUTER", "[" * 100_000, r"MOIETY_\*: JSON of one of these variables nests too deep"),
        ("MOIETY_ROUTER", '{"slots": true}', r"router\.slots = true: must be a whole .* \(from MOIETY_ROUTER\)"),
        (
            "MOIETY_ROUTER__SLOTS__X",
            "1",
            r"router\.slots: must be a whole number from 1 to 4096, not a mapping \(from MOIETY_ROUTER__SLOTS__X\)",
        ),
        (
            "MOIETY_EXPERTS__NUM_CPUS",
            "inf",
            r"num_cpus = 'inf': must be a number of at least 0 \(from MOIETY_EXPERTS__NUM_CPUS\)",
        ),
        ("MOIETY_SECRETS_DIR", "/no/such/folder", "MOIETY_SECRETS_DIR = '/no/such/folder': must be a folder"),
    ],
)
def test_a_wrong_variable_is_reported(
    variable: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """A variable that names no setting inside a section, or that cannot be read, is an error, and said once."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=message):
        resolve({"model": "m"})
    assert not caplog.messages


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"slots": 64}, r"setting slots: unknown; did you mean router\.slots\?"),
        ({"gatway": {"port": 3, "http": True}}, r"setting gatway: unknown; did you mean gateway\?"),
        ({"threads": 2}, r"unknown; did you mean router\.threads or experts\.threads\?"),
        (
            {"gateway": {"max_concurent": 2}},
            r"gateway\.max_concurent: unknown; did you mean gateway\.max_concurrent",
        ),
        ({"ROUTER": {"SLOTS": 3}}, r"setting ROUTER: unknown; did you mean router\.slots\?"),
        ({"router": {"Slots": 3}}, r"setting router\.Slots: unknown; did you mean router\.slots\?"),
        ({"frobnicate": 1}, "setting frobnicate: unknown; `moiety settings` lists all"),
    ],
)
def test_the_error_for_an_unknown_setting_names_the_one_that_may_be_meant(given: dict[str, Any], message: str):
    """The error names the settings with that name in a section, else those with a similar name."""
    with pytest.raises(ConfigError, match=message):
        resolve({"model": "m", **given})


@pytest.mark.parametrize("name", ["registry", "registri", "overrides", "experts"])
def test_the_registrys_password_is_shown_nowhere(name: str):
    """Text, repr and JSON show the URL without its password; errors show nothing of it where it was put elsewhere."""
    given = {"model": "m", "groups": 2, name: URL if name.startswith("r") else {"experts-0": {"url": URL}}}
    if name == "registry":
        settings = resolve(given)
        assert settings.registry.get_secret_value() == URL
        shown = [str(settings), repr(settings), settings.model_dump_json()]
    else:
        with pytest.raises(ConfigError, match=name) as refused:
            resolve(given)
        shown = [str(refused.value), repr(refused.value)]
    assert not any("hunter2" in text for text in shown)
    assert all("cache.example.com" in text for text in shown if name == "registry")


@pytest.mark.parametrize(
    ("kind", "values", "field", "message"),
    [
        (RouterSettings, {"model": "m", "slotz": 3}, "slotz", "setting slotz: unknown; did you mean slots?"),
        (
            RouterSettings,
            {"model": "m", "slots": 0},
            "slots",
            "setting slots = 0: must be a whole number from 1 to 4096",
        ),
        (
            RouterSettings,
            {"model": "m", "slots": "many"},
            "slots",
            "setting slots = 'many': must be a whole number from",
        ),
        (
            RouterSettings,
            {"model": "m", "dtype": "int4"},
            "dtype",
            "must be auto, float32, bfloat16 or float16",
        ),
        (
            RouterSettings,
            {"model": "m", "kv_memory": "4 gobs"},
            "kv_memory",
            "must be a number of bytes of at least 1KiB, such as 4GiB",
        ),
        (RouterSettings, {"model": "m", "slots": True}, "slots", "slots = true: must be a whole number from 1 to 4096"),
        (RouterSettings, {"model": "m", "kv_memory": True}, "kv_memory", "kv_memory = true: must be a number of bytes"),
        (RouterSettings, {"model": "m", "max_context": False}, "max_context", "max_context = false: must be a whole"),
        (
            AppSettings,
            {"model": "m", "experts": {"resources": {"a": True}}},
            "experts.resources.a",
            "= true: must be a",
        ),
        (
            AppSettings,
            {"model": "m", "overrides": {"experts-0": {"threads": True}}},
            "overrides.experts-0.threads",
            "true",
        ),
        (AppSettings, {"model": "m", "dtype": None}, "dtype", "dtype = null: must be auto, float32"),
        (AppSettings, {"model": "m", "router": {1: 2}}, "router.1", "the name of a setting must be a text"),
        (AppSettings, {"model": "m", "overrides": {1: {}}}, "overrides.1", "the name of a setting must be a text"),
        (AppSettings, {"model": date(2026, 1, 1)}, "model", 'model = "2026-01-01": must be a text'),
        (
            AppSettings,
            {"model": "m", "groups": HOLDS_ITSELF},
            "groups",
            "groups: must be a whole number from 1 to 4096, not",
        ),
        (GatewaySettings, {"model": "m", "port": 70000}, "port", "must be a whole number from 0 to 65535"),
        (GatewaySettings, {"model": "m", "port": 50080}, "http_port", "is the gRPC API's port"),
        (AppSettings, {"model": "m", "gateway": {"port": 7, "http_port": 7}}, "gateway.http_port", "one of its own"),
        (RouterSettings, {"model": "m", "app": "a b"}, "app", "setting app = 'a b': must be 1 to 64 of the characters"),
        (ExpertSettings, {"model": "m", "held": "0-3"}, "held", "expected LAYERS:EXPERTS, such as 0-31:0-7"),
        (ExpertSettings, {"model": "m", "held": "0:0", "capacity": 0}, "capacity", "must be a number above 0, or null"),
        (AppSettings, {"model": "m", "experts": {"min": 1}}, "experts.min", "experts.min: unknown"),
        (AppSettings, {"model": "m", "router": {"slots": 600}}, "router.token_budget", "at least slots, 600"),
        (
            AppSettings,
            {"model": "m", "experts": {"min_replicas": 5}},
            "experts.max_replicas",
            "at least min_replicas, 5",
        ),
        (
            AppSettings,
            {"model": "m", "router": {"min_replicas": 0}},
            "router.min_replicas",
            "must be a whole number from 1 to 1000",
        ),
        (
            AppSettings,
            {"model": "m", "experts": {"target_busy": 2}},
            "experts.target_busy",
            "must be a number above 0 and of at most 1",
        ),
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
    with pytest.raises(ConfigError, match="setting model: must be given") as refused:
        resolve({"registry": "redis://:secret@host"})
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b", "must hold a mapping"),
        ("a: [", "cannot be read"),
        ("", "must hold a mapping"),
        ("groups: " + "9" * 5000, "too many digits"),
        ("groups: 0x" + "f" * 5000, "groups = '0xf.*: must be a whole number"),
        ("groups: " + "[" * 2000, "nests too deep"),
        ("&a {groups: *a}", "line 1, column 13: an alias stands inside its own anchor"),
        (
            "a0: &a0 [1, 1]\n" + "".join(f"a{n + 1}: &a{n + 1} [*a{n}, *a{n}, *a{n}, *a{n}]\n" for n in range(30)),
            "more than 100000 values, counted with those that aliases repeat",
        ),
        ("router:\n  slots: 1\n  slots: 2", "line 3, column 3: 'slots' stands here a second time"),
        ("5: 3", "line 1, column 1: the name of a setting must be a text"),
        ("router: {1: 2}", "line 1, column 10: the name of a setting must be a text"),
        ("app: !!python/name:os.system", "line 1, column 6: settings have no tags"),
        ("groups: 3\n---\ngroups: 4", "line 2, column 1: a second document begins"),
        ("router:\n\tslots: 3", "line 2, column 1: not YAML: indent with spaces"),
        ("app: *hunter2", "line 1, column 6: not YAML: no anchor has the name of this alias"),
        ("router:\n  slots: 3\n   lanes: 4", "line 3, column 9: not YAML: check the indentation"),
        ("app: a: b", "line 1, column 7: not YAML: check the indentation, and put a text with"),
        ("app: \x01", r"character 6, U\+0001, may not stand in YAML"),
    ],
)
def test_a_bad_file_is_reported_with_its_path(yaml_file, text: str, message: str):
    """A file that is not a mapping, or not YAML, raises ConfigError, which names it."""
    path = yaml_file(text)
    with pytest.raises(ConfigError, match=message) as refused:
        resolve({"model": "m"}, path)
    assert path in str(refused.value) or len(path) > 80
    assert "hunter2" not in str(refused.value)


def test_values_of_a_file_are_what_they_look_like(yaml_file):
    """YAML 1.1 made a number of 1:30, a date of 2026-01-01 and a flag of no: here they are texts. An alias may be repeated."""
    settings = resolve(
        {"model": "m"},
        yaml_file(
            "app: no\nserved_name: 2026-01-01\nrouter: {slots: 010, lanes: 0x2, expert_wait_s: 1e1}\n"
            "overrides: {experts-0: &some {threads: 2}, experts-1: {<<: *some, num_cpus: .5}}"
        ),
    )
    assert (settings.app, settings.served_name) == ("no", "2026-01-01")
    assert (settings.router.slots, settings.router.lanes, settings.router.expert_wait_s) == (10, 2, 10.0)
    assert settings.overrides == {"experts-0": {"threads": 2}, "experts-1": {"threads": 2, "num_cpus": 0.5}}
    with pytest.raises(ConfigError, match="groups = '1:30': must be a whole number"):
        resolve({"model": "m"}, yaml_file("groups: 1:30"))


def test_a_missing_file_is_reported(tmp_path: Path):
    """A path that does not exist raises ConfigError."""
    with pytest.raises(ConfigError, match="cannot be read"):
        resolve({"model": "m"}, str(tmp_path / "none.yaml"))


def test_settings_are_frozen_and_unknown_keys_of_a_file_are_refused(yaml_file):
    """An unknown key in a file raises ConfigError, and a setting cannot be changed afterwards."""
    with pytest.raises(ConfigError, match="slotz"):
        resolve({"model": "m"}, yaml_file("slotz: 3"))
    settings = resolve({"model": "m"})
    with pytest.raises(ValueError, match="frozen"):
        settings.groups = 1


def test_sizes_names_and_experts_are_read_as_people_write_them(monkeypatch: pytest.MonkeyPatch):
    """4GiB is a size, the folder's name is the model's name, and experts are kept in their canonical form."""
    monkeypatch.setenv("MOIETY_ROUTER__KV_MEMORY", "4GiB")
    assert resolve({"model": "m"}).router.kv_memory == 4 << 30
    settings = validated(RouterSettings, {"model": "/models/Mixtral"})
    assert settings.name == "Mixtral"
    assert settings.advertised == settings.listen_host == "127.0.0.1"
    named = validated(GatewaySettings, {"model": "/m", "served_name": "mine", "advertise_host": "10.0.0.1"})
    assert (named.name, named.advertised) == ("mine", "10.0.0.1")
    assert validated(ExpertSettings, {"model": "m", "held": "1:0 ; 0:0"}).held == "0-1:0"
    assert resolve({"model": "m"}).experts == ExpertDeployment()


def test_the_cache_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The cache folder is $MOIETY_CACHE, else a folder in the home folder."""
    monkeypatch.setenv("MOIETY_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("MOIETY_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "moiety"


def test_two_ports_may_be_equal_where_only_one_is_used() -> None:
    """Two free ports, and a port of an HTTP API that is off, never collide."""
    assert validated(GatewaySettings, {"model": "m", "port": 0, "http_port": 0}).http_port == 0
    assert not validated(GatewaySettings, {"model": "m", "port": 50080, "http": False}).http
