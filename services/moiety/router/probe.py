"""Finds out what a model's attention layers keep per token by running one token through it: no per-model code."""

from __future__ import annotations

from typing import Any

import torch

from moiety.core import ModelShape
from moiety.errors import CheckpointError
from moiety.model.seam import use_backend
from moiety.router.attention import ProbeBatch
from moiety.router.kvcache import CacheSpec

RECURRENT = ("linear_attention", "mamba", "conv", "recurrent")


class _ZeroExperts:
    """An ExpertBackend whose experts all answer zero."""

    def submit(self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor) -> _ZeroRows:
        return _ZeroRows(hidden.new_zeros(*top_k_index.shape, hidden.shape[-1]))

    def while_waiting(self, layer: int) -> None: ...


class _ZeroRows:
    def __init__(self, rows: torch.Tensor):
        self._rows = rows

    def result(self) -> torch.Tensor:
        return self._rows


@torch.inference_mode()
def cache_spec(model: Any, shape: ModelShape) -> CacheSpec:
    """What each layer keeps. Raises CheckpointError for layers that keep something else than keys and values."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    recurrent = sorted({kind for kind in kinds if any(part in kind for part in RECURRENT)})
    if recurrent:
        raise CheckpointError(f"{shape.architecture}: layers of kind {', '.join(recurrent)} cannot be cached yet")
    batch = ProbeBatch()
    device = next(model.parameters()).device
    with use_backend(_ZeroExperts()):
        model(
            input_ids=torch.zeros(1, 1, dtype=torch.long, device=device),
            position_ids=torch.zeros(1, 1, dtype=torch.long, device=device),
            use_cache=False,
            moiety_batch=batch,
        )
    return batch.spec
