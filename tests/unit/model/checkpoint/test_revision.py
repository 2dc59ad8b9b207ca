"""The revision is equal for copies, and differs if anything that changes the output differs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.checkpoint.revision import revision_of
from moiety.synthetic import write_tiny


@pytest.fixture
def folder(open_tiny, tmp_path: Path) -> Path:
    """A copy of a tiny checkpoint that a test may change."""
    copy = tmp_path / "copy"
    shutil.copytree(open_tiny("mixtral")[0].path, copy)
    return copy


def named(folder: Path, **options: str) -> str:
    """Opens the folder and returns its revision."""
    return revision_of(Checkpoint.open(folder), **options)


def test_copies_are_equal(folder: Path, open_tiny):
    """The revision is 32 hex digits and depends on content: another path or transformers_version does not change it."""
    config = json.loads((folder / "config.json").read_text())
    config.update(transformers_version="5.0.0", _name_or_path="/elsewhere")
    (folder / "config.json").write_text(json.dumps(config, indent=4))
    assert named(folder) == named(open_tiny("mixtral")[0].path)
    assert re.fullmatch("[0-9a-f]{32}", named(folder))


def test_a_fine_tune_of_any_one_tensor_differs(folder: Path):
    """Changed values of a single tensor change the revision, although names, sizes and shapes stay the same."""
    seen = {named(folder)}
    first = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(first)
    for name in list(tensors)[:5]:
        tuned = {**tensors, name: tensors[name] + 0.001 * torch.randn_like(tensors[name])}
        save_file(tuned, first, metadata={"format": "pt"})
        now = named(folder)
        assert now not in seen, name
        seen.add(now)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_config_and_tokenizer_count(folder: Path, file: str):
    """A changed config, vocabulary or tokenizer config gives another revision."""
    before = named(folder)
    data = json.loads((folder / file).read_text())
    data["eos_token_id"] = 7
    (folder / file).write_text(json.dumps(data))
    assert named(folder) != before


def test_full_verification_finds_one_bit(tmp_path: Path):
    """One flipped bit outside all sampled blocks changes the full revision."""
    folder = write_tiny("mixtral", tmp_path / "wide", num_hidden_layers=1, vocab_size=4096)
    sampled, full = named(folder), named(folder, verify="full")
    entry = Checkpoint.open(folder).tensor("lm_head.weight")
    with entry.file.open("r+b") as stream:
        stream.seek(entry.start)
        byte = stream.read(1)[0]
        stream.seek(entry.start)
        stream.write(bytes([byte ^ 1]))
    assert named(folder) == sampled, "the flipped bit was meant to be outside of the sample"
    assert named(folder, verify="full") != full
