"""The expert layout is derived for every architecture in the same way and cached; unsupported checkpoints are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moiety.core.experts import ExpertMLP
from moiety.errors import CheckpointError
from moiety.model.architectures.recognise import recognise
from moiety.model.architectures.transformers_model import causal_lm_class, experts_modules, load_config
from moiety.model.checkpoint.checkpoint import SINGLE_FILE, Checkpoint
from moiety.model.checkpoint.revision import revision_of
from moiety.model.experts.cached import expert_layout
from moiety.synthetic import write_tiny
from support.architectures import CORE

MLP = "model.layers.1.mlp.experts"
EXPECTED = {  # sources of the gate_up parameter, in the first or second MoE layer; number of experts; top-k
    "mixtral": (tuple(f"model.layers.1.block_sparse_moe.experts.{{expert}}.{w}.weight" for w in ("w1", "w3")), 8, 2),
    "qwen2_moe": (("model.layers.2.mlp.experts.{expert}.gate_proj.weight",), 12, 4),
    "qwen3_moe": ((f"{MLP}.{{expert}}.gate_proj.weight", f"{MLP}.{{expert}}.up_proj.weight"), 16, 4),
    "olmoe": ((f"{MLP}.{{expert}}.gate_proj.weight", f"{MLP}.{{expert}}.up_proj.weight"), 16, 4),
    "deepseek_v2": ((f"{MLP}.{{expert}}.gate_proj.weight", f"{MLP}.{{expert}}.up_proj.weight"), 16, 4),
    "deepseek_v3": ((f"{MLP}.{{expert}}.gate_proj.weight", f"{MLP}.{{expert}}.up_proj.weight"), 16, 4),
    "glm4_moe_lite": ((f"{MLP}.{{expert}}.gate_proj.weight", f"{MLP}.{{expert}}.up_proj.weight"), 16, 4),
    "gpt_oss": ((f"{MLP}.gate_up_proj",), 8, 4),
}


@pytest.mark.parametrize("architecture", CORE)
def test_sources_are_the_published_names(open_tiny, architecture: str):
    """Each parameter's sources are the published tensor names, in the order of concatenation."""
    layout = open_tiny(architecture)[1]
    names, experts, top_k = EXPECTED[architecture]
    assert any(layer.sources["gate_up"][: len(names)] == names for layer in layout.layers[:2])
    assert (layout.shape.experts, layout.shape.top_k) == (experts, top_k)
    assert (layout.shape.dtype, layout.shape.vocabulary, layout.shape.max_context) == ("float32", 320, 512)
    assert layout.shape.moe_layers == len(layout.layers)


def test_gpt_oss_is_told_apart(open_tiny):
    """gpt-oss's gate, interleaving and biases are recognised from its module, not from its name."""
    assert open_tiny("gpt_oss")[1].shape.mlp == ExpertMLP(
        hidden=64,
        intermediate=96,
        activation="swiglu_clamped",
        interleaved=True,
        biased=True,
        limit=7.0,
        alpha=1.702,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", CORE)
def test_kernel_on_the_layout_equals_the_module(open_tiny, make_experts, architecture: str, dtype: torch.dtype):
    """Kernels with the derived spec and sources compute the same as transformers' experts module."""
    checkpoint, layout = open_tiny(architecture)
    model_class: Any = causal_lm_class(checkpoint, load_config(checkpoint))
    reference = model_class.from_pretrained(checkpoint.path, dtype=dtype, local_files_only=True)
    path, module = experts_modules(reference)[-1]
    assert path == layout.layers[-1].module
    rows = torch.randn(19, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    index = torch.arange(19 * 2).view(19, 2) % layout.shape.experts
    with torch.no_grad():
        expected = module(rows, index, torch.ones(19, 2, dtype=dtype))
    backend = make_experts(checkpoint, layout, dtype)
    out = backend.submit(len(layout.layers) - 1, rows, index).result()
    if layout.layers[-1].transposed and dtype is torch.float32:  # MKL sums transposed weights in another order
        torch.testing.assert_close(out.sum(dim=1), expected, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(out.sum(dim=1), expected)


def test_a_second_reader_uses_the_cache(open_tiny, cache: Path):
    """The next reader gets the layout in the cached file."""
    checkpoint, layout = open_tiny("mixtral")
    file = cache / revision_of(checkpoint) / "layout.json"
    written = file.read_text()
    data = json.loads(written)
    data["layout"]["shape"]["max_context"] = 77
    file.write_text(json.dumps(data))
    try:
        assert expert_layout(checkpoint).shape.max_context == 77
    finally:
        file.write_text(written)
    assert expert_layout(checkpoint) == layout


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"format": 0, "transformers": "1"}'],
    ids=["empty", "a list", "no keys", "another format"],
)
def test_an_unusable_cache_file_is_replaced(open_tiny, cache: Path, content: str):
    """A damaged or outdated cache file is derived again and replaced."""
    checkpoint, layout = open_tiny("qwen3_moe")
    file = cache / revision_of(checkpoint) / "layout.json"
    file.write_text(content)
    assert expert_layout(checkpoint) == layout
    assert json.loads(file.read_text())["layout"]["shape"]["experts"] == 16
    assert [path.name for path in file.parent.iterdir()] == ["layout.json"]


def test_an_unwritable_cache_costs_nothing_else(open_tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """If the cache cannot be written, the layout is still derived and returned."""
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("MOIETY_CACHE", str(blocked))
    checkpoint, layout = open_tiny("olmoe")
    assert expert_layout(checkpoint) == layout


DENSE = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
REFUSED = {
    "quantised": (
        {**DENSE, "quantization_config": {"quant_method": "aqlm"}},
        r"llama.*quantised \(aqlm\): must be one of fp8",
    ),
    "dense": (DENSE, "architecture llama.*LlamaForCausalLM is a dense model"),
    "dense of a kind with experts": (
        {**DENSE, "model_type": "granitemoehybrid", "layer_types": ["attention"], "num_local_experts": 0},
        "GraniteMoeHybridForCausalLM is a dense model",
    ),
    "unknown": ({"model_type": "grok-2"}, r"config\.json: model_type = 'grok-2': no architecture .*mean 'grok-1'"),
    "no model type": ({}, r"config\.json: model_type is missing"),
    "not a language model": ({"model_type": "vit"}, "architecture vit.*no class that generates text"),
}


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_served_is_refused(tmp_path: Path, config: dict[str, Any], message: str):
    """An unsupported checkpoint raises an error that names the architecture and what is missing."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"x": torch.zeros(1)}, tmp_path / SINGLE_FILE)
    with pytest.raises(CheckpointError, match=message):
        expert_layout(Checkpoint.open(tmp_path))


def test_a_missing_expert_is_named(tmp_path: Path):
    """If the config states more experts than the checkpoint holds, the error names the first missing tensor."""
    folder = write_tiny("qwen3_moe", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_experts": 17, "num_local_experts": 17}))
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.experts\.16\.gate_proj\.weight is missing"):
        expert_layout(Checkpoint.open(folder))


def test_another_width_is_refused(tmp_path: Path):
    """Tensors whose shape differs from the config's are refused before they are read."""
    folder = write_tiny("gpt_oss", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(CheckpointError, match="does not have the shape its config states"):
        expert_layout(Checkpoint.open(folder))


def test_an_unknown_gate_is_refused():
    """A module whose gate no kernel computes is refused, even if its parameters look like a supported one's."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    class OddExperts(MixtralExperts):
        def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
            gate, up = gate_up.chunk(2, dim=-1)
            return torch.tanh(gate) * up

    config = MixtralConfig(hidden_size=16, intermediate_size=8, num_local_experts=2)
    assert recognise(MixtralExperts(config)).mlp.activation == "silu"
    with pytest.raises(ValueError, match="OddExperts applies a gate"):
        recognise(OddExperts(config))
