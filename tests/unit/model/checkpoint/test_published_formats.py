"""Checkpoints with quantised weights as published: served without growing, with the right tokens, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from published_formulas import dequantised_copy
from safetensors.torch import load_file, save_file
from trunk_reference import PROMPT_LENGTHS, attention_of, greedy, prompt, reference

from moiety.core.experts import ExpertSet
from moiety.errors import CheckpointError
from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.experts.cached import expert_layout
from moiety.model.experts.read import load_experts
from moiety.model.seam import forward_context
from moiety.model.trunk.read import load_trunk
from moiety.synthetic import write_tiny
from moiety.synthetic.formats import FORMATS

HELD_AS = {
    "deepseek_v3-fp8": "fp8",
    "gpt_oss-mxfp4": "mxfp4",
    "mixtral-gptq": "int4",
    "mixtral-awq": "int4",
    "deepseek_v3-int4": "int4",
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory):
    """Returns the folder of a named tiny checkpoint, written on first use."""
    folders: dict[str, Path] = {}

    def write(name: str) -> Path:
        if name not in folders:
            folders[name] = write_tiny(name, tmp_path_factory.mktemp("formats") / name)
        return folders[name]

    return write


@pytest.mark.parametrize("name", FORMATS)
def test_greedy_tokens_are_those_of_the_dequantised_model(written, make_experts, tmp_path: Path, name: str):
    """In fp32 every token equals transformers' on weights dequantised by the published formula in float64."""
    plain = reference(Checkpoint.open(dequantised_copy(written(name), tmp_path / "plain")))
    checkpoint = Checkpoint.open(written(name))
    layout = expert_layout(checkpoint)
    router = load_trunk(checkpoint, layout, torch.float32, attention=attention_of(checkpoint.architecture))
    with forward_context(make_experts(checkpoint, layout)), torch.no_grad():
        for length in PROMPT_LENGTHS:
            expected = greedy(plain, prompt(length))
            assert torch.equal(greedy(router, prompt(length)), expected)
            assert (router(expected).logits - plain(expected).logits).abs().max() <= 2e-5


@pytest.mark.parametrize("name", FORMATS)
def test_experts_are_held_as_small_as_published(written, name: str):
    """A replica holds at most 5 % more bytes than the files, in a format that kernels compute with."""
    checkpoint = Checkpoint.open(written(name))
    layout = expert_layout(checkpoint)
    shape = layout.shape
    loaded = load_experts(checkpoint, layout, ExpertSet.uniform(shape.moe_layers, range(shape.experts)), torch.float32)
    assert {weights.kind for weights in loaded.values()} == {HELD_AS[name]}
    held = sum(weights.nbytes for weights in loaded.values())
    published = sum(
        tensor.nbytes
        for shard in checkpoint.shards
        for tensor_name, tensor in load_file(shard).items()
        if ".experts." in tensor_name
    )
    assert held <= 1.05 * published


def test_a_quantised_model_computes_in_the_dtype_of_its_config(written):
    """The layout of a quantised checkpoint has the dtype that its config states, not the stored one."""
    checkpoint = Checkpoint.open(written("deepseek_v3-fp8"))
    assert expert_layout(checkpoint).shape.dtype == "float32"


def edited(folder: Path, target: Path, **quantization: Any) -> Path:
    """Makes a copy of the checkpoint with other values in its quantization_config."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] |= quantization
    (target / "config.json").write_text(json.dumps(config))
    return target


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "another method": (
        "mixtral-gptq",
        {"quant_method": "aqlm"},
        r"mixtral.*quantised \(aqlm\): must be one of fp8, mxfp4",
    ),
    "fp8 by tensor": ("deepseek_v3-fp8", {"weight_block_size": None}, r"weight_block_size None: must be \[128, 128\]"),
    "act-order": ("mixtral-gptq", {"desc_act": True}, r"\(gptq\): desc_act"),
    "3 bits": ("mixtral-gptq", {"bits": 3}, "bits 3: must be 4"),
    "gemv": ("mixtral-awq", {"version": "gemv"}, "version gemv: must be gemm"),
    "fp4 codes": ("deepseek_v3-int4", {"format": "nvfp4-pack-quantized"}, "format nvfp4.*must be pack-quantized"),
    "no group": ("deepseek_v3-int4", {"config_groups": {}}, "no config group targets model.layers.1.mlp.experts"),
}


@pytest.mark.parametrize(("name", "change", "message"), REFUSED.values(), ids=REFUSED)
def test_variants_that_are_not_served_are_named(written, tmp_path: Path, name: str, change: dict, message: str):
    """Opening a checkpoint with an unsupported variant raises an error that names it and the supported values."""
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(edited(written(name), tmp_path / "copy", **change))


def test_act_order_that_the_config_hides_is_found(written, tmp_path: Path):
    """Reading columns in another order than the groups raises an error, even if the config says desc_act is off."""
    folder = edited(written("mixtral-gptq"), tmp_path / "copy")
    shard = next(folder.glob("*.safetensors"))
    tensors = load_file(shard)
    name = next(name for name in tensors if ".experts.3.w1.g_idx" in name)
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, shard, metadata={"format": "pt"})
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(CheckpointError, match="act-order"):
        load_experts(checkpoint, expert_layout(checkpoint), [(0, 3)], torch.float32)


def test_a_missing_scale_is_named(written, tmp_path: Path):
    """Codes without their scales raise an error that names the missing tensor, before any weight is read."""
    folder = edited(written("deepseek_v3-fp8"), tmp_path / "copy")
    shard = next(folder.glob("*.safetensors"))
    tensors = load_file(shard)
    del tensors["model.layers.1.mlp.experts.0.up_proj.weight_scale_inv"]
    save_file(tensors, shard, metadata={"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"].pop("model.layers.1.mlp.experts.0.up_proj.weight_scale_inv")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"experts\.0\.up_proj\.weight_scale_inv, which belongs to .* is missing"):
        Checkpoint.open(folder)
