"""The revision is equal for copies, and differs if anything that changes the output differs."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moiety.errors import CheckpointError
from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.checkpoint.revision import pinned_revision, revision_of
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


def _flip(folder: Path, tensor: str, offset: int) -> None:
    """Flips one bit of `tensor`, `offset` bytes from its start, or before its end where negative."""
    entry = Checkpoint.open(folder).tensor(tensor)
    with entry.file.open("r+b") as stream:
        stream.seek((entry.start if offset >= 0 else entry.end) + offset)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("offset", [0, -1], ids=["first byte", "last byte"])
def test_heads_and_tails_of_every_tensor_count(folder: Path, offset: int):
    """A bit flipped in the first or last block of a tensor, even of one among hundreds, changes the revision."""
    names = list(Checkpoint.open(folder).tensors)
    seen = {named(folder)}
    for name in names[:: max(1, len(names) // 12)]:
        _flip(folder, name, offset)
        now = named(folder)
        assert now not in seen, name
        seen.add(now)


def test_a_large_tensor_is_sampled_along_its_length(tmp_path: Path):
    """In a tensor of 24 MiB, changed rows of 5 MiB anywhere change the revision."""
    wide = torch.zeros(24, 1 << 18)  # rows of 1 MiB
    file = tmp_path / "model.safetensors"
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]})
    )
    seen = set[str]()
    for first in (None, 1, 7, 13, 18):
        tuned = wide.clone()
        if first is not None:
            tuned[first : first + 5] += 1.0
        save_file({"embed.weight": tuned}, file)
        seen.add(named(tmp_path))
    assert len(seen) == 5


@pytest.mark.parametrize("row", [1, 1234, 2999])
@pytest.mark.parametrize("tensor", ["model.embed_tokens.weight", "lm_head.weight"])
def test_one_row_of_an_embedding_counts(tmp_path: Path, tensor: str, row: int):
    """A fine-tune of a single token's row, anywhere in the vocabulary, changes the revision."""
    folder = write_tiny("mixtral", tmp_path / "rows", num_hidden_layers=1, vocab_size=3000)
    before = named(folder)
    _flip(folder, tensor, row * Checkpoint.open(folder).tensor(tensor).nbytes // 3000 + 2)
    assert named(folder) != before


def test_a_service_refuses_another_checkpoint(folder: Path):
    """Where a revision is set, a checkpoint with another one is refused; the message names both."""
    checkpoint = Checkpoint.open(folder)
    found = revision_of(checkpoint)
    assert pinned_revision(checkpoint, "sampled", "") == pinned_revision(checkpoint, "sampled", found) == found
    with pytest.raises(CheckpointError, match=f"has revision {found}, but this system serves revision {'0' * 32}"):
        pinned_revision(checkpoint, "sampled", "0" * 32)


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
    folder = write_tiny("mixtral", tmp_path / "wide", num_hidden_layers=1, intermediate_size=512)
    sampled, full = named(folder), named(folder, verify="full")
    _flip(folder, "model.layers.0.block_sparse_moe.experts.0.w1.weight", 8192)
    assert named(folder) == sampled, "the flipped bit was meant to be outside of the sample"
    assert named(folder, verify="full") != full


def test_a_further_chat_template_differs(folder: Path):
    """A chat template for tools changes what is served, so it changes the revision."""
    before = named(folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text("{{ tools }}")
    assert named(folder) != before
