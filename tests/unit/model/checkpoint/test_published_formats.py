"""Checkpoints with quantised weights as published: served without growing, with the right tokens, or refused."""

from __future__ import annotations

import json
import shutil
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
from moiety.model.checkpoint.revision import revision_of
from moiety.model.experts.cached import expert_layout
from moiety.model.experts.read import load_experts
from moiety.model.seam import forward_context
from moiety.model.trunk.read import load_trunk
from moiety.synthetic import write_tiny
from moiety.synthetic.formats import FORMATS

HELD_AS = {
    "deepseek_v3-fp8": "fp8",
    "mixtral-fp8": "fp8",
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
        r"mixtral.*quantised \(aqlm\): must be one of fp8, modelopt, mxfp4",
    ),
    "small blocks": (
        "deepseek_v3-fp8",
        {"weight_block_size": [64, 64]},
        r"weight_block_size \[64, 64\]: must be \[128, 128\]",
    ),
    "blocks unsaid": (
        "deepseek_v3-fp8",
        {"weight_block_size": None},
        r"its scale \[2, 1\]: must be \[O, D\] and one factor",
    ),
    "nvfp4": ("mixtral-fp8", {"quant_algo": "NVFP4"}, r"\(modelopt\): quant_algo NVFP4: must be FP8"),
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


OWN_FILES = {
    "modelopt": ("mixtral-fp8", "hf_quant_config.json", "quantization"),
    "AutoGPTQ": ("mixtral-gptq", "quantize_config.json", None),
}


@pytest.mark.parametrize(("name", "file", "key"), OWN_FILES.values(), ids=OWN_FILES)
def test_quantisation_may_be_stated_in_a_tools_own_file(written, tmp_path: Path, name: str, file: str, key: str | None):
    """The file of modelopt or AutoGPTQ counts like config.json and makes another revision; without it nothing is served."""
    folder = edited(written(name), tmp_path / "copy")
    stated = Checkpoint.open(folder)
    config = json.loads((folder / "config.json").read_text())
    quantization = config.pop("quantization_config")
    del quantization["quant_method"]
    (folder / "config.json").write_text(json.dumps(config))
    unsaid = Checkpoint.open(folder)
    revision = revision_of(unsaid)
    with pytest.raises(CheckpointError, match=f"none of config.json, .*{file}"):
        expert_layout(unsaid)
    (folder / file).write_text(json.dumps({key: quantization} if key else quantization))
    moved = Checkpoint.open(folder)
    assert moved.tensors == stated.tensors
    assert revision_of(moved) != revision
    assert expert_layout(moved) == expert_layout(stated)


def test_a_cache_in_fp8_does_not_make_the_weights_quantised(open_tiny, tmp_path: Path):
    """modelopt's file without quant_algo leaves the weights as they are."""
    folder = shutil.copytree(open_tiny("mixtral")[0].path, tmp_path / "copy")
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": null, "kv_cache_quant_algo": "FP8"}}')
    assert not Checkpoint.open(folder).quantization


@pytest.mark.parametrize("content", ['{"quantization": "FP8"}', "[]", "{"])
def test_a_damaged_file_of_modelopt_is_named(open_tiny, tmp_path: Path, content: str):
    """A file of modelopt that is no JSON object, or states no object, raises an error that names it."""
    folder = shutil.copytree(open_tiny("mixtral")[0].path, tmp_path / "copy")
    (folder / "hf_quant_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"hf_quant_config\.json: "):
        Checkpoint.open(folder)


def test_fp8_without_blocks_has_one_scale_a_matrix(written, tmp_path: Path):
    """AutoFP8's config, which states no blocks, gives the same weights as modelopt's."""
    folder = edited(written("mixtral-fp8"), tmp_path / "copy", quant_method="fp8", activation_scheme="static")
    expected, found = Checkpoint.open(written("mixtral-fp8")), Checkpoint.open(folder)
    assert expert_layout(found) == expert_layout(expected)
    for checkpoint in (expected, found):
        assert checkpoint.tensor("model.layers.0.self_attn.q_proj.weight").dtype == "fp8_by_matrix (8 bits)"


def test_a_layer_with_the_number_of_another_models_last_is_read(tmp_path: Path):
    """Layer 46 of a quantised GLM with 47 layers is read, although it predicts several tokens in GLM-4.5-Air, which has 46."""
    folder = write_tiny("glm4_moe", tmp_path, num_hidden_layers=47, first_k_dense_replace=46)
    shard = next(folder.glob("*.safetensors"))
    tensors = load_file(shard)
    name = "model.layers.46.self_attn.q_proj.weight"
    tensors |= {name: tensors[name].to(torch.float8_e4m3fn), f"{name}_scale": torch.tensor(2.0)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    checkpoint = Checkpoint.open(folder)
    trunk = load_trunk(checkpoint, expert_layout(checkpoint), torch.float32)
    assert torch.equal(trunk.get_parameter(name), 2 * tensors[name].float())


def test_scales_stored_as_exponents_are_read(written, tmp_path: Path):
    """Block scales in F8_E8M0 mean the same as the same powers of two in float32."""
    read = []
    for dtype in (torch.float32, torch.float8_e8m0fnu):
        folder = edited(written("deepseek_v3-fp8"), tmp_path / str(dtype))
        for shard in folder.glob("*.safetensors"):
            tensors = load_file(shard)
            for name in [name for name in tensors if name.endswith("_scale_inv")]:
                tensors[name] = tensors[name].log2().ceil().exp2().to(dtype)
            save_file(tensors, shard, metadata={"format": "pt"})
        checkpoint = Checkpoint.open(folder)
        read.append(load_experts(checkpoint, expert_layout(checkpoint), [(0, 3)], torch.float32)[0, 3])
    for expected, found in zip(read[0].gate_up.tensors, read[1].gate_up.tensors, strict=True):
        assert torch.equal(expected.float(), found.float())


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
