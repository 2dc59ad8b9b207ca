"""What a checkpoint's JSON files state, once, twice or wrongly: what counts, and what is said of the rest."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moiety.errors import CheckpointError, shown
from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.checkpoint.headers import TensorEntry
from moiety.model.checkpoint.reading import Reader
from moiety.model.checkpoint.side_files import AUTOAWQ_FILE, INDEX_FILE, end_ids
from moiety.model.experts.derive import derive_layout
from moiety.model.experts.read import load_expert
from moiety.model.trunk.read import load_trunk
from moiety.synthetic import write_tiny


@pytest.fixture
def folder(tiny: Callable[[str], str], tmp_path: Path) -> Path:
    """A tiny checkpoint that a test may change."""
    return shutil.copytree(tiny("mixtral"), tmp_path / "copy")


def edit(file: Path, **fields: Any) -> None:
    """Sets fields of a JSON file, which is made if it is missing."""
    stated = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**stated, **fields}))


@pytest.mark.parametrize(
    ("config", "generation", "of_tokenizer", "ids", "warning"),
    [
        (-1, None, 1, (1,), "config.json: eos_token_id = -1: only ids from 0 to 319"),
        (1, [1, 32007], None, (1,), r"generation_config.json: eos_token_id = \[1, 32007\]: only ids"),
        ([1, None], None, None, (1,), r"only ids from 0 to 319"),
        (1, None, 320, (1,), "tokenizer_config.json: eos_token_id = 320: only"),
        (5, [1], 2, (1, 2), r"states eos_token_id 5, generation_config.json \[1\], which counts: \[5\] end nothing"),
        (None, None, None, (), "no file states an end-of-sequence id"),
    ],
)
def test_ends_that_no_output_can_have(
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    config: Any,
    generation: Any,
    of_tokenizer: int | None,
    ids: tuple[int, ...],
    warning: str,
) -> None:
    """Ids below 0 or beyond the vocabulary are passed over with a warning; generation_config.json goes before config.json."""
    edit(folder / "config.json", eos_token_id=config)
    if generation is not None:
        edit(folder / "generation_config.json", eos_token_id=generation)
    with caplog.at_level(logging.WARNING):
        assert end_ids(folder, of_tokenizer) == ids
    assert len(caplog.messages) == 1
    assert re.search(warning, caplog.messages[0])


@pytest.mark.parametrize(
    ("file", "field", "value", "bound"),
    [
        ("config.json", "eos_token_id", "</s>", "a token id"),
        ("config.json", "vocab_size", "32000", "an integer from 1"),
        ("config.json", "num_experts_per_tok", 9, "an integer from 1 to 8"),
        ("config.json", "max_position_embeddings", 0, "an integer from 1"),
        ("config.json", "torch_dtype", "int7", "one of float32"),
        ("config.json", "vocab_size", 321, "320, the rows of lm_head.weight"),
        ("generation_config.json", "eos_token_id", [1, True], "a token id"),
    ],
)
def test_a_value_out_of_its_bound(folder: Path, file: str, field: str, value: Any, bound: str) -> None:
    """The error names file, field, value and bound, before any weight is read."""
    edit(folder / file, **{field: value})
    with pytest.raises(CheckpointError) as caught:
        derive_layout(Checkpoint.open(folder))
    assert f"{folder / file}: {field} = {shown(value)}: must be {bound}" in str(caught.value)


def test_the_index_decides_where_two_shards_hold_a_tensor(folder: Path) -> None:
    """A second copy of a tensor in a later shard does not count, for experts' readers and for the trunk."""
    name = "model.norm.weight"
    shard = next(file for file in sorted(folder.glob("*.safetensors")) if name in load_file(file))
    weights = load_file(shard)
    save_file({name: weights[name] + 1, "lm_head.weight": weights["lm_head.weight"]}, folder / "z.safetensors")
    index = json.loads((folder / INDEX_FILE).read_text())
    index["weight_map"]["lm_head.weight"] = "z.safetensors"
    (folder / INDEX_FILE).write_text(json.dumps(index))
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.tensor(name).file == shard
    assert checkpoint.repeated == {name, "lm_head.weight"}
    trunk: Any = load_trunk(checkpoint, derive_layout(checkpoint), torch.float32)
    assert torch.equal(trunk.model.norm.weight, weights[name])


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_layers_of_one_expert(architecture: str, tmp_path: Path) -> None:
    """A layer may have a single expert, in a tensor of its own."""
    sizes = {"num_local_experts": 1} if architecture == "mixtral" else {"num_experts": 1}
    checkpoint = Checkpoint.open(write_tiny(architecture, tmp_path, num_experts_per_tok=1, **sizes))
    layout = derive_layout(checkpoint)
    assert (layout.shape.experts, layout.shape.top_k) == (1, 1)
    (name,) = layout.layers[1].sources["down"]
    entry = checkpoint.tensor(name.replace("{expert}", "0"))
    assert isinstance(entry, TensorEntry)
    with Reader() as reader:
        expert = load_expert(reader, checkpoint, layout, 1, 0, torch.float32)
        assert torch.equal(torch.as_tensor(expert.down), reader.tensor(entry))


def test_where_quantisation_may_be_stated(tmp_path: Path) -> None:
    """AutoAWQ's own file, and a quantization_config inside text_config, count like that of config.json."""
    folder = write_tiny("mixtral-awq", tmp_path)
    stated = Checkpoint.open(folder)
    config = json.loads((folder / "config.json").read_text())
    quantization = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    edit(folder / AUTOAWQ_FILE, w_bit=4, q_group_size=32, zero_point=True, version="GEMM")
    assert Checkpoint.open(folder).tensors == stated.tensors
    (folder / AUTOAWQ_FILE).unlink()
    edit(folder / "config.json", text_config={"quantization_config": quantization})
    assert Checkpoint.open(folder).tensors == stated.tensors


def test_others_can_read_what_is_written(tmp_path: Path) -> None:
    """Files of weights have the mode that the umask gives, like the files beside them."""
    folder = write_tiny("mixtral", tmp_path)
    assert {file.stat().st_mode for file in folder.iterdir()} == {(folder / "config.json").stat().st_mode}
