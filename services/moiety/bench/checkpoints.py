"""The checkpoints that the benchmarks serve: synthetic ones by name, or a folder that the user names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

# 90 M parameters, 75 M of them in experts: enough work per step to measure, small enough for a laptop.
_SMALL: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 8192,
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 384,
        "initializer_range": 0.02,
    }
)
# 0.91 B parameters, 0.81 B of them in experts: in bfloat16 more than most caches can hold.
_LARGE: Mapping[str, Any] = MappingProxyType(
    {
        **_SMALL,
        "hidden_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "head_dim": 128,
        "num_experts": 32,
        "moe_intermediate_size": 512,
    }
)
SYNTHETIC: Mapping[str, Mapping[str, Any]] = MappingProxyType({"small": _SMALL, "large": _LARGE})
LEAST_CONTEXT = 2048


def model_name(model: str) -> str:
    """Returns the name under which reports show `model`."""
    return f"synthetic qwen3_moe, {model}" if model in SYNTHETIC else Path(model).name


def model_folder(model: str, parent: Path, dtype: str, context: int, progress: Callable[[str], None]) -> Path:
    """Writes the SYNTHETIC model named `model` to a folder in `parent`, with at least `context` tokens of context.

    Returns the folder. If `model` is not in SYNTHETIC, it must be a checkpoint folder; returns that and writes nothing.
    """
    if model not in SYNTHETIC:
        return Path(model)
    from moiety.synthetic import write_tiny  # takes seconds: commands ask for the names above before that

    progress(f"model: writing a {model_name(model)}")
    stored = "bfloat16" if dtype == "auto" else dtype
    return write_tiny(
        "qwen3_moe",
        parent / model,
        **SYNTHETIC[model],
        max_position_embeddings=max(LEAST_CONTEXT, context),
        dtype=stored,
    )
