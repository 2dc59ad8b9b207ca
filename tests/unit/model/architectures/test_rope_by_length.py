"""The longest text of a model: as far as its rope scaling reaches and no rotation depends on the length of the text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moiety.errors import CheckpointError
from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.experts.derive import derive_layout
from moiety.synthetic import write_tiny

LIMIT, LONGEST = 64, 256
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": LIMIT,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + 0.7 * i for i in range(8)],
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": LIMIT}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}


def max_context(checkpoint: Checkpoint) -> int:
    """Returns the most tokens of a text that a router offers for `checkpoint`."""
    return derive_layout(checkpoint).shape.max_context


def checkpoint_with(rope: dict[str, Any], architecture: str, folder: Path) -> Checkpoint:
    """Writes a tiny checkpoint with these rope parameters."""
    return Checkpoint.open(
        write_tiny(architecture, folder, rope_parameters=rope, max_position_embeddings=LONGEST, num_hidden_layers=2)
    )


@pytest.mark.parametrize(
    ("architecture", "rope"),
    [
        ("qwen3_moe", LONGROPE),
        ("phimoe", {**LONGROPE, "short_mscale": 1.0, "long_mscale": 1.4}),
        ("deepseek_v2", {**LONGROPE, "long_factor": [2.0] * 4, "short_factor": [1.0] * 4}),  # complex rotations
        (
            "mimo_v2_flash",
            {"full_attention": LONGROPE, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}},
        ),
    ],
    ids=["factors", "scales", "complex factors", "by type of layer"],
)
def test_longrope_is_served_up_to_its_first_length(architecture: str, rope: dict[str, Any], tmp_path: Path):
    """Longrope is served up to its original length: up to it only the short factors apply."""
    assert max_context(checkpoint_with(rope, architecture, tmp_path)) == LIMIT


def configured(folder: Path, **config: Any) -> Checkpoint:
    """Writes a tiny checkpoint, and `config` into its config instead of rope_parameters, as other tools publish it."""
    write_tiny("mixtral", folder, max_position_embeddings=LONGEST, num_hidden_layers=1)
    written = json.loads((folder / "config.json").read_text())
    written.pop("rope_parameters", None)
    (folder / "config.json").write_text(json.dumps(written | config))
    return Checkpoint.open(folder)


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_the_original_length_may_stand_at_the_top_of_the_config(name: str, tmp_path: Path):
    """Wherever the config states the original length, and however it names longrope's parameters, the same is served."""
    rope = {key: value for key, value in LONGROPE.items() if key != "original_max_position_embeddings"}
    checkpoint = configured(tmp_path, **{name: rope}, original_max_position_embeddings=LIMIT)
    assert max_context(checkpoint) == LIMIT


YARN = {"rope_type": "yarn", "factor": 4.0}
ODD_ROPES = {
    "an old name": (
        {**LONGROPE, "rope_type": "su"},
        "rope_type is 'su': must be one of default, .*earlier name of longrope",
    ),
    "a misspelt name": ({"rope_type": "yarm", "factor": 2}, "rope_type is 'yarm': must be .*; did you mean 'yarn'"),
    "no name": ({"rope_type": 3}, "rope_type = 3: must be a string"),
    "a null": ({**YARN, "factor": None}, "factor is null: a rope of the kind yarn needs a number from 1e-6"),
    "no factor": ({"type": "dynamic"}, "factor is missing: a rope of the kind dynamic needs a number"),
    "a factor beyond float32": (
        {**YARN, "factor": 1e300},
        r"factor = 1e\+300: must be a number from 1e-6 to 1e6",
    ),
    "a base of 1": ({**YARN, "rope_theta": 1}, "rope_theta = 1: must be a number above 1 and at most 1e18"),
    "a null base": ({**YARN, "rope_theta": None}, "rope_theta is null: must be a number above 1"),
    "a text": ({**YARN, "beta_fast": "x"}, "beta_fast = 'x': must be a number from 0"),
    "an infinity": ({**YARN, "mscale": float("inf")}, "mscale = inf: must be a number from 0"),
    "a share above 1": (
        {**YARN, "partial_rotary_factor": 2},
        "partial_rotary_factor = 2: must be a number from 0 to 1",
    ),
    "an original length of 1": ({**LONGROPE, "original_max_position_embeddings": 1}, "= 1: must be an integer from 2"),
    "no lists": (
        {"rope_type": "longrope"},
        "short_factor is missing: a rope of the kind longrope needs a list of numbers",
    ),
    "a list with a zero": (
        {**LONGROPE, "long_factor": [1.0, 0]},
        r"= \[1.0, 0\]: must be a list of numbers, each a number from",
    ),
    "a short list": (
        {**LONGROPE, "short_factor": [1.0] * 7},
        "short_factor has 7 numbers: must have 8, one for each pair",
    ),
    "a long list": (
        {**LONGROPE, "long_factor": [1.0] * 9},
        "long_factor has 9 numbers: must have 8, one for each pair",
    ),
}


@pytest.mark.parametrize(("rope", "sentence"), ODD_ROPES.values(), ids=ODD_ROPES)
def test_a_rope_that_cannot_be_computed(rope: dict[str, Any], sentence: str, tmp_path: Path):
    """The error names the file, the field, its value and the bound that this kind of rope has for it."""
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{sentence}"):
        max_context(configured(tmp_path, rope_scaling=rope))


@pytest.mark.parametrize(
    ("architecture", "rope"),
    [
        # As published for Phi-3.5-MoE: transformers changes only the scale, and both scales are equal.
        ("phimoe", {**LONGROPE, "short_mscale": 1.24, "long_mscale": 1.24}),
        ("qwen3_moe", {**LONGROPE, "long_factor": LONGROPE["short_factor"]}),
        # As published for Llama 4 Scout: nothing lies between the two wavelengths.
        ("qwen3_moe", {**LLAMA3, "low_freq_factor": 1.0, "high_freq_factor": 1.0}),
        ("qwen3_moe", DYNAMIC),  # changes only beyond the model's limit
        ("qwen3_moe", {"rope_type": "default", "rope_theta": 10000.0}),
    ],
    ids=["equal scales", "equal factors", "equal wavelengths", "dynamic", "default"],
)
def test_what_does_not_change_is_served_whole(architecture: str, rope: dict[str, Any], tmp_path: Path):
    """A rope whose rotations are the same for short and long texts is served up to the model's limit."""
    assert max_context(checkpoint_with(rope, architecture, tmp_path)) == LONGEST


@pytest.mark.parametrize(
    ("rope", "reached"),
    [
        ({"factor": 8.0, "original_max_position_embeddings": LIMIT}, 8 * LIMIT),  # as users add it to a config
        ({"factor": 4.0, "original_max_position_embeddings": LIMIT}, LONGEST),  # as DeepSeek publishes it
        ({"factor": 2.0, "original_max_position_embeddings": LIMIT}, 2 * LIMIT),
        ({"factor": 4.0}, LONGEST),  # not known whether the config's length is extended already
    ],
    ids=["beyond the stated length", "the stated length", "below the stated length", "no original length"],
)
def test_yarn_reaches_its_factor_times_the_original_length(rope: dict[str, Any], reached: int, tmp_path: Path):
    """With YaRN, the longest text has `factor` times the original length, whatever max_position_embeddings states."""
    assert max_context(configured(tmp_path, rope_scaling={"rope_type": "yarn", **rope})) == reached
