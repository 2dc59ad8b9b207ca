"""`moiety serve` refuses what cannot work before it starts anything: one line that names the setting, exit status 1."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moiety.cli.main import run


@pytest.fixture
def truncated(tiny: Callable[[str], str], tmp_path: Path) -> str:
    """A checkpoint whose weights end too early."""
    for file in Path(tiny("mixtral")).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (shard, *_) = tmp_path.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-100])
    return str(tmp_path)


def test_too_many_groups(tiny: Callable[[str], str], capsys: pytest.CaptureFixture[str]) -> None:
    """More groups than experts is told with the bound."""
    assert run(["serve", tiny("mixtral"), "--groups", "99"]) == 1
    assert "error: setting groups = 99: must be 1 to 8, the model's experts per layer" in capsys.readouterr().err


def test_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder without a checkpoint is named, with what is missing in it."""
    assert run(["serve", str(tmp_path)]) == 1
    assert f"error: {tmp_path}/config.json: missing" in capsys.readouterr().err


def test_corrupt_checkpoint(truncated: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A shard that is shorter than its header says is named."""
    assert run(["serve", truncated]) == 1
    assert ".safetensors: truncated" in capsys.readouterr().err


def test_unreachable_registry(tiny: Callable[[str], str], capsys: pytest.CaptureFixture[str]) -> None:
    """A Redis that does not answer is told by its address, and its password is not."""
    assert run(["serve", tiny("mixtral"), "--registry", "redis://:hunter2@127.0.0.1:1/0"]) == 1
    told = capsys.readouterr().err
    assert "error: registry redis://" in told
    assert "127.0.0.1:1/0" in told
    assert "hunter2" not in told


def test_settings_that_contradict_each_other(tiny: Callable[[str], str], capsys: pytest.CaptureFixture[str]) -> None:
    """What a router replica would refuse is refused here, not in a replica's log."""
    assert run(["serve", tiny("mixtral"), "--slots", "4096", "--grpc-port", "0"]) == 1
    assert "error: setting token_budget = 512: must be at least slots, 4096" in capsys.readouterr().err


def test_options_win_over_the_file(
    tiny: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the file says holds where no option says otherwise."""
    file = tmp_path / "app.yaml"
    file.write_text("{groups: 77, experts: {min_replicas: 3}}")
    assert run(["serve", tiny("mixtral"), "--config", str(file)]) == 1
    assert "setting groups = 77" in capsys.readouterr().err
    assert run(["serve", tiny("mixtral"), "--config", str(file), "--groups", "88"]) == 1
    assert "setting groups = 88" in capsys.readouterr().err
    assert run(["serve", tiny("mixtral"), "--config", str(file), "--groups", "2", "--max-replicas", "1"]) == 1
    assert "error: setting max_replicas = 1: must be at least min_replicas, 3" in capsys.readouterr().err
