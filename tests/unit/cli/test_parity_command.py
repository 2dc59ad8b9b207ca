"""`moiety parity`: the verdict as text, JSON and exit status."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.slow
def test_identical_tokens_exit_zero(tiny: Callable[[str], str], moiety: Callable, tmp_path: Path) -> None:
    """A served checkpoint whose tokens agree passes: stages on stderr, report on stdout, exit status 0.

    Slow: it starts its own cluster, as tests/parity does in every run.
    """
    file = tmp_path / "parity.json"
    outcome = moiety("parity", tiny("qwen3_moe"), "--new-tokens", "4", "--json", str(file))
    assert outcome.status == 0, outcome.err
    assert outcome.out.splitlines()[-1].startswith("PASS: qwen3_moe float32, 2 expert groups: 8/8 prompts identical")
    assert [line.split("] ")[1].partition(":")[0] for line in outcome.err.splitlines()] == [
        "reference",
        "served",
        "logits",
    ]
    written = json.loads(file.read_text())
    assert written["ok"] is True
    assert {"architecture", "dtype", "groups", "logit_error", "prompts"} < set(written)


def test_unknown_architecture_exits_one(tiny: Callable[[str], str], moiety: Callable, tmp_path: Path) -> None:
    """A checkpoint that cannot be served fails with an error that names its folder and its architecture."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny("qwen3_moe"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "perceptron_1958"}))
    outcome = moiety("parity", str(folder))
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.err.startswith(f"error: {folder}/config.json: model_type = 'perceptron_1958': ")


def test_too_many_groups_exit_one(tiny: Callable[[str], str], moiety: Callable) -> None:
    """More groups than experts are refused with the bound."""
    outcome = moiety("parity", tiny("qwen3_moe"), "--groups", "17", "--new-tokens", "1")
    assert outcome.status == 1
    assert "error: setting groups = 17: must be 1 to 16" in outcome.err
