"""Values of a config with which transformers reads or builds no model: named by file and field, with what they must be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moiety.errors import CheckpointError
from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.experts.derive import derive_layout
from moiety.synthetic import write_tiny


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model_type": "qwen3-moe"}, "model_type = 'qwen3-moe': no architecture .*; did you mean 'qwen3_moe'"),
        (
            {"model_type": "x", "auto_map": {"AutoConfig": "x.X"}},
            "model_type = 'x': .* code that the checkpoint brings",
        ),
        ({"model_type": None}, "model_type is missing"),
        ({"vision_config": {"model_type": []}}, r"vision_config\.model_type = \[\]: must be a string"),
        ({"hidden_act": "sillu"}, "hidden_act = 'sillu': must be one of gelu, .*, xielu; did you mean 'silu'"),
        ({"hidden_act": 3}, "hidden_act = 3: must be a string: copy it from its publisher again"),
        ({"head_dim": 0}, "head_dim = 0: must be an integer from 1"),
        ({"head_dim": 15}, "head_dim = 15: must be even"),
        ({"num_key_value_heads": 0}, "num_key_value_heads = 0: must be an integer from 1"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps = inf: must be a number from 0 to 1"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step = 0: must be at least 1: copy"),
        ({"moe_intermediate_size": -1}, "moe_intermediate_size = -1: must be at least 1: copy"),
        ({"mlp_only_layers": "x"}, "mlp_only_layers = 'x': must be a list or null: copy"),
        ({"mlp_only_layers": ["x"]}, r'mlp_only_layers = \["x"\]: holds an item of a wrong type: copy'),
        ({"pad_token_id": 5000}, "pad_token_id = 5000: must be below vocab_size"),
        ({"layer_types": "full_attention"}, "layer_types = 'full_attention': must be a list"),
        (
            {"layer_types": ["full_attn"]},
            r"layer_types\[0\] = 'full_attn': must be one of .*did you mean 'full_attention'",
        ),
        ({"layer_types": ["full_attention"] * 3}, "layer_types has 3 entries: .* num_hidden_layers = 1: copy"),
        ({"mlp_only_layers": [0]}, "its values leave no layer with experts to qwen3_moe: copy"),
        ({"model_type": "qwen2"}, r"model_type = 'qwen2': .*, but the weights have experts, such as model\.\S+: copy"),
        ({"model_type": "mixtral"}, r"\.experts\.\S+ .* no weight of the model, .* is not that of these weights"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_what_transformers_cannot_use_is_named(config: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    """The error names config.json, the field, its value and what it must be, in words of Moiety."""
    folder = write_tiny("qwen3_moe", tmp_path, num_hidden_layers=1)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    with pytest.raises(CheckpointError, match=rf"^(checkpoint )?{tmp_path}.*{sentence}"):
        derive_layout(Checkpoint.open(folder))
