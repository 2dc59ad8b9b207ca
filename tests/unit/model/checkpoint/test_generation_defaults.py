"""The sampling settings that a checkpoint recommends in generation_config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moiety.errors import CheckpointError, shown
from moiety.model.checkpoint.bounds import MAX_COUNT
from moiety.model.checkpoint.generation_defaults import GenerationDefaults


def test_what_a_publisher_recommends(tmp_path: Path) -> None:
    """The known fields are read and the others passed over; what is missing or null stays open."""
    assert GenerationDefaults.open(tmp_path) == GenerationDefaults()
    stated = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": None, "eos_token_id": [1, 2], "do_sample": False}
    (tmp_path / "generation_config.json").write_text(json.dumps(stated))
    assert GenerationDefaults.open(tmp_path) == GenerationDefaults(temperature=0.6, top_k=20, top_p=0.95)


def test_the_whole_vocabulary(tmp_path: Path) -> None:
    """-1 and 0 both mean that top-k is off; whole numbers may be written with a point."""
    for stated in (-1, 0, -1.0):
        (tmp_path / "generation_config.json").write_text(json.dumps({"top_k": stated, "max_new_tokens": 7.0}))
        assert GenerationDefaults.open(tmp_path) == GenerationDefaults(top_k=0, max_new_tokens=7)


@pytest.mark.parametrize(
    ("field", "value", "bound"),
    [
        ("temperature", -0.1, "a number from 0 to 10"),
        ("temperature", "hot", "a number from 0 to 10"),
        ("temperature", True, "a number from 0 to 10"),
        ("temperature", float("nan"), "a number from 0 to 10"),
        ("top_p", 0, "a number above 0 and at most 1"),
        ("top_p", 1.1, "a number above 0 and at most 1"),
        ("min_p", 2, "a number from 0 to 1"),
        ("temperature", 11, "a number from 0 to 10"),
        ("repetition_penalty", 0, "a number above 0 and at most 10"),
        ("top_k", 1.5, f"an integer from -1 to {MAX_COUNT}"),
        ("max_new_tokens", 0, f"an integer from 1 to {MAX_COUNT}"),
        ("max_new_tokens", [1], f"an integer from 1 to {MAX_COUNT}"),
    ],
)
def test_values_out_of_bounds(tmp_path: Path, field: str, value: Any, bound: str) -> None:
    """The error names file, field, value and bound."""
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({field: value}))
    with pytest.raises(CheckpointError) as caught:
        GenerationDefaults.open(tmp_path)
    assert str(caught.value) == f"{file}: {field} = {shown(value)}: must be {bound}"


def test_a_damaged_file(tmp_path: Path) -> None:
    """A file that is no JSON object is a damaged checkpoint."""
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="instead of a JSON object"):
        GenerationDefaults.open(tmp_path)
