"""Rotary positions that depend on the length of the text: served as far as they do not, refused by name beyond."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from moiety.errors import CheckpointError, ConfigError
from moiety.model.architectures.rope_by_length import check_rope
from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.synthetic import write_tiny

LIMIT, LONGEST = 64, 256
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": LIMIT,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + 0.7 * i for i in range(8)],
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}


def checkpoint_with(rope: dict[str, Any], architecture: str, folder: Path) -> Checkpoint:
    """Writes a tiny checkpoint with these rope parameters."""
    return Checkpoint.open(
        write_tiny(architecture, folder, rope_parameters=rope, max_position_embeddings=LONGEST, num_hidden_layers=1)
    )


@pytest.mark.parametrize(
    ("architecture", "rope"),
    [
        ("qwen3_moe", LONGROPE),
        ("phimoe", {**LONGROPE, "short_mscale": 1.0, "long_mscale": 1.4}),
        ("deepseek_v2", {**LONGROPE, "long_factor": [2.0] * 4, "short_factor": [1.0] * 4}),  # complex rotations
        ("mimo_v2_flash", {"full_attention": LONGROPE, "sliding_attention": {"rope_type": "default"}}),
    ],
    ids=["factors", "scales", "complex factors", "by type of layer"],
)
def test_longrope_is_served_up_to_its_first_length(architecture: str, rope: dict[str, Any], tmp_path: Path):
    """Longrope is refused above its original length, with what to set; up to it only the short factors apply."""
    checkpoint = checkpoint_with(rope, architecture, tmp_path)
    check_rope(checkpoint, LIMIT)
    expected = f"max_context = {LIMIT + 1}: must be at most {LIMIT}, the checkpoint's original_max_position_embeddings"
    with pytest.raises(ConfigError, match=f"{re.escape(expected)}.*rope_type longrope"):
        check_rope(checkpoint, LIMIT + 1)


def configured(folder: Path, **config: Any) -> Checkpoint:
    """Writes a tiny checkpoint, and `config` into its config instead of rope_parameters, as other tools publish it."""
    write_tiny("mixtral", folder, max_position_embeddings=LONGEST, num_hidden_layers=1)
    written = json.loads((folder / "config.json").read_text())
    written.pop("rope_parameters", None)
    (folder / "config.json").write_text(json.dumps(written | config))
    return Checkpoint.open(folder)


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_the_original_length_may_stand_at_the_top_of_the_config(name: str, tmp_path: Path):
    """Wherever the config states the original length, and however it names longrope's parameters, the same is refused."""
    rope = {key: value for key, value in LONGROPE.items() if key != "original_max_position_embeddings"}
    checkpoint = configured(tmp_path, **{name: rope}, original_max_position_embeddings=LIMIT)
    check_rope(checkpoint, LIMIT)
    with pytest.raises(ConfigError, match=f"max_context = {LIMIT + 1}: must be at most {LIMIT}"):
        check_rope(checkpoint, LIMIT + 1)


def test_an_old_name_of_longrope_is_refused(tmp_path: Path):
    """transformers does not know `su`, and would fail with a KeyError."""
    checkpoint = configured(tmp_path, rope_scaling={**LONGROPE, "rope_type": "su"})
    with pytest.raises(CheckpointError, match=r"rope_type su: .* longrope"):
        check_rope(checkpoint, LIMIT)


@pytest.mark.parametrize(
    ("architecture", "rope"),
    [
        # As published for Phi-3.5-MoE: transformers changes only the scale, and both scales are equal.
        ("phimoe", {**LONGROPE, "short_mscale": 1.24, "long_mscale": 1.24}),
        ("qwen3_moe", {**LONGROPE, "long_factor": LONGROPE["short_factor"]}),
        ("qwen3_moe", DYNAMIC),  # changes only beyond the model's limit
        ("qwen3_moe", {"rope_type": "default", "rope_theta": 10000.0}),
    ],
    ids=["equal scales", "equal factors", "dynamic", "default"],
)
def test_what_does_not_change_is_served_whole(architecture: str, rope: dict[str, Any], tmp_path: Path):
    """A rope whose rotations are the same for short and long texts is served up to the model's limit."""
    check_rope(checkpoint_with(rope, architecture, tmp_path), LONGEST)
