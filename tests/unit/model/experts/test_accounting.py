"""Every tensor of a checkpoint is read as its file means it, is unused on purpose, or is refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moiety.errors import CheckpointError
from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.checkpoint.headers import TensorEntry
from moiety.model.checkpoint.quantised import Stored
from moiety.model.experts.derive import derive_layout
from moiety.synthetic import write_tiny

ATTENTION, EXPERT = "model.layers.0.self_attn", "model.layers.1.block_sparse_moe.experts.2"
UNSAID = r"none of config\.json, .*\.json and quant_config\.json says how it is quantised"


def with_tensors(checkpoint: Checkpoint, dtypes: Mapping[str, str]) -> Checkpoint:
    """Returns the checkpoint with the tensors `dtypes`: one that it has gets another dtype, any other one is new."""
    some = next(entry for entry in checkpoint.tensors.values() if isinstance(entry, TensorEntry))
    tensors: dict[str, Stored] = dict(checkpoint.tensors)
    for name, dtype in dtypes.items():
        entry = tensors.get(name, some)
        assert isinstance(entry, TensorEntry)
        tensors[name] = replace(entry, dtype=dtype)
    return replace(checkpoint, tensors=tensors)


MISREAD = {
    "fp8 attention": ("mixtral", f"{ATTENTION}.q_proj.weight", "F8_E4M3"),
    "int8 attention": ("mixtral", f"{ATTENTION}.q_proj.weight", "I8"),
    "an fp8 expert": ("mixtral", f"{EXPERT}.w3.weight", "F8_E5M2"),
    "fused fp4 experts": ("gpt_oss", "model.layers.3.mlp.experts.down_proj", "F4"),
    "a head in bytes": ("mixtral", "lm_head.weight", "U8"),
}


@pytest.mark.parametrize(("architecture", "name", "dtype"), MISREAD.values(), ids=MISREAD)
def test_a_dtype_that_no_format_explains_is_refused(open_tiny, architecture: str, name: str, dtype: str):
    """A weight in a dtype of quantised codes is refused by name if no file says how it is quantised."""
    checkpoint = with_tensors(open_tiny(architecture)[0], {name: dtype})
    with pytest.raises(CheckpointError, match=f"{name} is {dtype}, but {UNSAID}"):
        derive_layout(checkpoint)


LEFT_OVER = {
    "a scale": ("mixtral", f"{ATTENTION}.q_proj.weight_scale", f"{ATTENTION}.q_proj.weight"),
    "an expert's zero point": ("mixtral", f"{EXPERT}.w1.weight_zero_point", f"{EXPERT}.w1.weight"),
    "an expert's bias": ("mixtral", f"{EXPERT}.w2.bias", f"{EXPERT}.w2.weight"),
    "a scale of fused experts": (
        "gpt_oss",
        "model.layers.3.mlp.experts.down_proj_scale",
        r"model\.layers\.3\.mlp\.experts\.\w+",
    ),
}


@pytest.mark.parametrize(("architecture", "name", "owner"), LEFT_OVER.values(), ids=LEFT_OVER)
def test_a_tensor_left_over_beside_a_weight_is_refused(open_tiny, architecture: str, name: str, owner: str):
    """A tensor that nothing reads, in a module with a weight that is read, is refused with the name of both."""
    checkpoint = with_tensors(open_tiny(architecture)[0], {name: "F32"})
    with pytest.raises(CheckpointError, match=rf"{name} \(F32 .*\) belongs to {owner} \(F32\), but {UNSAID}"):
        derive_layout(checkpoint)


@pytest.mark.parametrize(
    "name", [f"{ATTENTION}.q_norm.weight", "model.layers.4.mlp.gate_proj.weight", "adapter.weight"]
)
def test_a_module_that_the_model_lacks_is_refused(open_tiny, name: str):
    """A tensor of a module, or of a layer, that the architecture does not have is refused by name."""
    with pytest.raises(CheckpointError, match=rf"{name} \(F32 .*\) becomes no weight of the model"):
        derive_layout(with_tensors(open_tiny("mixtral")[0], {name: "F32"}))


def test_parts_that_the_stated_format_lacks_are_refused(open_tiny):
    """A left-over part beside quantised weights is refused with the name of the stated format."""
    name = "model.layers.1.mlp.experts.3.up_proj.weight_zero_point"
    with pytest.raises(CheckpointError, match=rf"{name} .* stated quantisation \(compressed-tensors\) has no such"):
        derive_layout(with_tensors(open_tiny("deepseek_v3-int4")[0], {name: "I32"}))


UNUSED = {
    "towers": (
        "vision_model.model.layers.0.self_attn.q_proj.weight",  # Llama 4
        "vision_model.class_embedding",
        "multi_modal_projector.linear_1.weight",
        "model.visual.blocks.0.attn.qkv.bias",  # Qwen3-VL
        "visual.merger.mlp.0.weight",
        "vision_tower.encoder.blocks.0.wqkv.weight",  # Kimi-K2.5
        "mm_projector.proj.0.weight",
        "model.embed_vision.embedding_projection.weight",  # Gemma 4
        "audio_encoder.norm.weight",  # MiMo-V2
        "talker.model.layers.0.mlp.gate.weight",  # Qwen3-Omni
        "image_newline",
    ),
    "layers for several tokens": (
        "mtp.fc.weight",  # Qwen3-Next
        "mtp.layers.0.mlp.experts.0.up_proj.weight",
        "model.mtp.layers.0.enorm.m.weight",  # LongCat-Flash
        "model.mtp_block.0.self_attn.q_proj.weight",  # Ernie 4.5
        "model.mtp_linear_proj.0.weight",
        "model.layers.4.eh_proj.weight",  # DeepSeek-V3 (layer 61 of 61), GLM-4.5 and GLM-5
        "model.layers.4.enorm.weight",
        "model.layers.4.embed_tokens.weight",
        "model.layers.4.shared_head.head.weight",
        "model.layers.4.mlp.experts.0.gate_proj.weight",
    ),
    "what is computed": ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"),
    "scales of caches and activations": (
        "model.layers.0.self_attn.k_scale",
        "model.layers.0.self_attn.v_scale",
        "model.layers.0.self_attn.attn.kv_scale",
        "model.layers.0.self_attn.k_proj.k_scale",  # modelopt
        "model.layers.0.self_attn.q_proj.input_scale",
        "model.layers.0.self_attn.o_proj.activation_scale",
    ),
}


@pytest.mark.parametrize("names", UNUSED.values(), ids=UNUSED)
@pytest.mark.parametrize("architecture", ["deepseek_v3", "mixtral"])
def test_what_publishers_add_on_purpose_is_left_out(open_tiny, architecture: str, names: tuple[str, ...]):
    """Tensors of towers, of layers for several tokens, of rotary embeddings and of caches change nothing."""
    checkpoint, layout = open_tiny(architecture)
    assert derive_layout(with_tensors(checkpoint, dict.fromkeys(names, "BF16"))) == layout


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_only_biases_of_zeros_may_be_left_over(tmp_path: Path, value: float):
    """AutoGPTQ wrote a bias of zeros for each matrix, which changes nothing; any other bias is refused."""
    folder = write_tiny("mixtral-gptq", tmp_path)
    shard = next(folder.glob("*.safetensors"))
    tensors = load_file(shard)
    name = f"{ATTENTION}.q_proj.bias"
    save_file({**tensors, name: torch.full((64,), value)}, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint.open(folder)
    assert name in checkpoint.tensors
    if value == 0:
        assert derive_layout(checkpoint).shape.experts == 8
    else:
        with pytest.raises(CheckpointError, match=rf"{name} .* belongs to {ATTENTION}\.q_proj\.weight"):
            derive_layout(checkpoint)


def test_more_experts_in_the_file_than_in_the_config_are_refused(tmp_path: Path):
    """A config that states fewer experts than the file holds is refused, with both numbers."""
    folder = write_tiny("mixtral", tmp_path / "model", num_hidden_layers=1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_local_experts": 4}))
    with pytest.raises(CheckpointError, match=r"it has 8 tensors such as .*, but config.json states 4 experts"):
        derive_layout(Checkpoint.open(folder))
