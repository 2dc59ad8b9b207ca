"""`moiety serve` refuses wrong settings before it starts anything: one line that names the setting, exit status 1."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moiety.cli.main import run
from moiety.cli.serve import read_settings, serve
from moiety.config.application import AppSettings


@pytest.fixture
def truncated(tiny: Callable[[str], str], tmp_path: Path) -> str:
    """A checkpoint whose shard is 100 bytes too short."""
    for file in Path(tiny("mixtral")).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (shard, *_) = tmp_path.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-100])
    return str(tmp_path)


def test_too_many_groups(tiny: Callable[[str], str], capsys: pytest.CaptureFixture[str]) -> None:
    """More groups than experts are refused with the bound."""
    assert run(["serve", tiny("mixtral"), "--groups", "99"]) == 1
    assert "error: setting groups = 99: must be 1 to 8, the model's experts per layer" in capsys.readouterr().err


def test_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For a folder without a checkpoint the error says what to name instead."""
    assert run(["serve", str(tmp_path)]) == 1
    assert f"error: checkpoint {tmp_path}: is empty: name a folder with config.json" in capsys.readouterr().err


def test_corrupt_checkpoint(truncated: str, capsys: pytest.CaptureFixture[str]) -> None:
    """For a shard that is shorter than its header says, the error names the shard."""
    assert run(["serve", truncated]) == 1
    assert ".safetensors: truncated" in capsys.readouterr().err


def test_unreachable_registry(tiny: Callable[[str], str], capsys: pytest.CaptureFixture[str]) -> None:
    """If Redis does not answer, the error names its address without its password."""
    assert run(["serve", tiny("mixtral"), "--registry", "redis://:hunter2@127.0.0.1:1/0"]) == 1
    stderr = capsys.readouterr().err
    assert "error: registry redis://" in stderr
    assert "127.0.0.1:1/0" in stderr
    assert "hunter2" not in stderr


def test_settings_that_contradict_each_other(tiny: Callable[[str], str], capsys: pytest.CaptureFixture[str]) -> None:
    """Settings that a router replica would refuse are refused by the command, not only in a replica's log."""
    assert run(["serve", tiny("mixtral"), "--slots", "4096", "--grpc-port", "0", "--http-port", "0"]) == 1
    assert "error: setting router.token_budget = 512: must be at least slots, 4096" in capsys.readouterr().err


def test_options_win_over_the_file(
    tiny: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A setting of the file holds unless an option overrides it."""
    file = tmp_path / "app.yaml"
    file.write_text("{groups: 77, experts: {min_replicas: 3}}")
    assert run(["serve", tiny("mixtral"), "--config", str(file)]) == 1
    assert "setting groups = 77" in capsys.readouterr().err
    assert run(["serve", tiny("mixtral"), "--config", str(file), "--groups", "88"]) == 1
    assert "setting groups = 88" in capsys.readouterr().err
    assert run(["serve", tiny("mixtral"), "--config", str(file), "--groups", "2", "--max-replicas", "1"]) == 1
    assert "error: setting experts.max_replicas = 1: must be at least min_replicas, 3" in capsys.readouterr().err


def test_the_file_and_the_environment_choose_the_dtype(
    tiny: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --dtype, the one of the file applies, before it that of the environment; --dtype wins over both."""
    file = tmp_path / "app.yaml"
    file.write_text("dtype: float32")
    assert _settings(tiny("mixtral"), "--config", str(file)).dtype == "float32"
    monkeypatch.setenv("MOIETY_DTYPE", "bfloat16")
    assert _settings(tiny("mixtral"), "--config", str(file)).dtype == "bfloat16"
    assert _settings(tiny("mixtral"), "--config", str(file), "--dtype", "float16").dtype == "float16"


def test_every_option_of_a_setting_reaches_it(tiny: Callable[[str], str]) -> None:
    """The options with names of their own set the same settings as --set, which wins where both are given."""
    short = _settings(
        tiny("mixtral"),
        *("--groups", "3", "--max-replicas", "6", "--hot-sets", "2", "--registry", "redis://h:1/0", "--app", "chat"),
        *(
            "--grpc-port",
            "50052",
            "--http-port",
            "50082",
            "--slots",
            "64",
            "--kv-memory",
            "2GiB",
            "--set",
            "router.slots=65",
        ),
    )
    assert (short.groups, short.experts.max_replicas, short.hot_sets, short.app) == (3, 6, 2, "chat")
    assert (short.gateway.http, short.gateway.http_port) == (True, 50082)
    assert (short.gateway.port, short.router.slots, short.router.kv_memory) == (50052, 65, 2 << 30)
    assert str(short.registry) == "redis://h:1/0"


def test_a_text_may_look_like_a_number(tiny: Callable[[str], str]) -> None:
    """Names are taken as they are written, whatever YAML would make of them."""
    settings = _settings(tiny("mixtral"), "--app", "0123", "--set", "served_name=on", "--set", 'listen_host="::"')
    assert (settings.app, settings.served_name, settings.listen_host) == ("0123", "on", "::")


@pytest.mark.parametrize(
    ("assignment", "status", "message"),
    [
        ("slots=4", 1, "error: setting slots: unknown; did you mean router.slots?"),
        ("overrides.experts-7.max_replicas=8", 1, "experts-7: no such expert group or hot set; there are experts-0 to"),
        ("router.slots", 2, "must be NAME=VALUE, such as router.slots=64"),
        ("router.slots={", 2, "must be a value as in YAML; line 1, column 2"),
        ("router={slots: 1, slots: 2}", 2, "'slots' stands here a second time"),
        ("router.slots=true", 1, "router.slots = true: must be a whole number from 1 to 4096"),
        ("ROUTER.SLOTS=3", 1, "did you mean router.slots?"),
    ],
)
def test_wrong_assignments(
    assignment: str, status: int, message: str, tiny: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    """An assignment that cannot be read is wrong usage; one of an unknown setting says which may be meant."""
    assert run(["serve", tiny("mixtral"), "--set", assignment]) == status
    assert message in capsys.readouterr().err


def test_settings_lists_all_of_them(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`settings` prints each setting with its default, its variable and its meaning; words choose among them."""
    monkeypatch.setenv("MOIETY_REGISTRY", "redis://:hunter2@h:1/0")
    assert run(["settings"]) == 0
    everything = capsys.readouterr().out
    assert "router.kv_memory = 1GiB  [MOIETY_ROUTER__KV_MEMORY]\n    Bytes of a router for keys" in everything
    assert "\nmodel  [MOIETY_MODEL]\n" in everything
    assert "hunter2" not in everything
    assert run(["settings", "lanes", "port"]) == 0
    names = [line.split(" ")[0] for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert names == ["router.lanes", "router.transport", "gateway.port", "gateway.http_port"]


def _settings(*words: str) -> AppSettings:
    """Returns the settings that the command would serve with."""
    options = serve.make_context("serve", list(words)).params
    return read_settings(**{name: options[name] for name in options.keys() - {"ray_address", "dashboard"}})
