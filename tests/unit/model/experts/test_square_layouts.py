"""Fused layouts whose matrices are square, so that no shape tells [in, out] from [out, in]."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from trunk_reference import attention_of

from moiety.errors import CheckpointError
from moiety.model.checkpoint.checkpoint import SINGLE_FILE, Checkpoint
from moiety.model.experts.cached import expert_layout
from moiety.model.experts.derive import derive_layout
from moiety.model.experts.read import load_experts
from moiety.model.seam import forward_context
from moiety.model.trunk.read import load_trunk
from moiety.synthetic import tiny_model, write_tiny
from moiety.tools.parity.parity import reference_model
from moiety_kernels.weights.fp8 import Fp8Matrix

HIDDEN = 64
FUSED = {  # every way in which one tensor holds all experts -> the config field for the width of an expert
    "gpt_oss": "intermediate_size",  # [in, out], with biases
    "gpt_oss-mxfp4": "intermediate_size",  # codes [out, in] of parameters [in, out]
    "aria_text": "intermediate_size",  # [in, out], under other names
    "llama4_text": "intermediate_size",  # [in, out], through an adapter
    "dbrx": "ffn_config.ffn_hidden_size",  # rows of one expert after the other; only `down` is [in, out]
    "granitemoe": "intermediate_size",  # [out, in], renamed
    "gemma4_text": "moe_intermediate_size",  # [out, in], as transformers holds them
}


@pytest.mark.parametrize("width", [HIDDEN, HIDDEN // 2], ids=["square down", "square gate and up"])
@pytest.mark.parametrize("name", FUSED)
def test_a_square_matrix_is_read_as_its_layout_says(make_experts, tmp_path: Path, name: str, width: int):
    """Trunk and experts compute the logits of parity's reference where a matrix is square, as the real gpt-oss's `down` is."""
    section, _, field = FUSED[name].rpartition(".")
    settings = {section: {**tiny_model(name).settings[section], field: width}} if section else {field: width}
    checkpoint = Checkpoint.open(write_tiny(name, tmp_path, **settings))
    layout = expert_layout(checkpoint)
    assert (layout.shape.mlp.hidden, layout.shape.mlp.intermediate) == (HIDDEN, width)
    prompt = torch.randint(3, 320, (1, 12), generator=torch.Generator().manual_seed(5))
    router = load_trunk(checkpoint, layout, torch.float32, attention=attention_of(checkpoint.architecture))
    with torch.inference_mode(), forward_context(make_experts(checkpoint, layout)):
        found = router(prompt).logits
        expected = reference_model(str(checkpoint.path), torch.float32, None)(prompt).logits
    scale = expected.abs().max()
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=2e-5)


@pytest.mark.parametrize("width", [HIDDEN, HIDDEN // 2], ids=["square down", "square gate and up"])
def test_a_layout_that_only_shapes_tell_is_refused_if_square(tmp_path: Path, width: int):
    """transformers turns Qwen3-VL-MoE's matrices by shape: a square one is refused by name, before weights are read."""
    checkpoint = Checkpoint.open(write_tiny("qwen3_vl_moe", tmp_path, text_config={"moe_intermediate_size": width}))
    tensor = "down_proj" if width == HIDDEN else "gate_up_proj"
    with pytest.raises(CheckpointError, match=rf"layers\.0\.mlp\.experts\.{tensor} holds square matrices, 64 x 64"):
        derive_layout(checkpoint)


def test_quantised_codes_in_out_are_turned(tmp_path: Path):
    """Fused fp8 matrices [in, out], which no kernel takes, are dequantised and turned, also square ones."""
    folder = write_tiny("gpt_oss", tmp_path, intermediate_size=HIDDEN)
    (shard,) = Checkpoint.open(folder).shards
    tensors = load_file(shard)
    stored, expected = dict(tensors), {}
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        matrices = [Fp8Matrix.of(matrix) for matrix in tensors[name]]
        stored[name] = torch.stack([matrix.codes for matrix in matrices])
        stored[f"{name}_scale_inv"] = torch.stack([matrix.scale for matrix in matrices])
        expected[name] = [matrix.dequantised(torch.float32).T for matrix in matrices]
    save_file(stored, folder / SINGLE_FILE)  # is read instead of the shards
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint.open(folder)
    experts = load_experts(checkpoint, expert_layout(checkpoint), [(1, 5)], torch.float32)[1, 5]
    assert torch.equal(experts.gate_up, expected["model.layers.1.mlp.experts.gate_up_proj"][5])
    assert torch.equal(experts.down, expected["model.layers.1.mlp.experts.down_proj"][5])
