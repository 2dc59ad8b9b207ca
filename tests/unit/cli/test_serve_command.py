"""`moiety serve` refuses wrong settings before it starts anything: one line that names the setting, exit status 1."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moiety.cli.main import run


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
    """For a folder without a checkpoint the error names the missing file."""
    assert run(["serve", str(tmp_path)]) == 1
    assert f"error: {tmp_path}/config.json: missing" in capsys.readouterr().err


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
    assert run(["serve", tiny("mixtral"), "--slots", "4096", "--grpc-port", "0"]) == 1
    assert "error: setting token_budget = 512: must be at least slots, 4096" in capsys.readouterr().err


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
    assert "error: setting max_replicas = 1: must be at least min_replicas, 3" in capsys.readouterr().err
