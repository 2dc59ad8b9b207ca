"""Architectures that transformers lacks, built from transformers' parts. Code shipped in a checkpoint is never run."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any

# model_type -> (module in this folder, which imports transformers; its causal-LM class, named as publishers name it)
DEFINITIONS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "arctic": ("arctic", "ArcticForCausalLM"),
        "deepseek": ("deepseek", "DeepseekForCausalLM"),
        "glam": ("glam", "GlamForCausalLM"),
        "grok-1": ("grok1", "Grok1ModelForCausalLM"),
    }
)


def definition_of(model_type: str) -> Any | None:
    """Imports and returns the causal-LM class that this package defines for `model_type`; None if there is none.

    The class's `config_class` is the architecture's config class.
    """
    if model_type not in DEFINITIONS:
        return None
    module, name = DEFINITIONS[model_type]
    return getattr(import_module(f"{__name__}.{module}"), name)
