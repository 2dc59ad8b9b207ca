"""The decay tensors of MiniMax's lightning attention: checkpoints store them, although the heads' slopes determine them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_DECAYS = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")


def with_decays(name: str, tensor: torch.Tensor) -> Iterable[tuple[str, torch.Tensor]]:
    """Replaces a decay tensor's noise by what transformers computes for the tensor's layer, heads and tokens.

    Yields one pair (`name`, tensor), as a `Store` of `catalogue.py` does. Other tensors stay unchanged.
    """
    decay = name.rpartition(".")[2]
    if decay in _DECAYS:
        from transformers.models.minimax.modeling_minimax import MiniMaxConfig, MiniMaxLightningAttention

        heads, tokens = tensor.shape[-3], tensor.shape[-2]  # [H, 1, 1], [H, tokens, 1] or [1, H, tokens, tokens]
        layer = int(name.split(".layers.")[1].partition(".")[0])
        kinds = ["linear_attention"] * 64
        config = MiniMaxConfig(num_attention_heads=heads, block_size=tokens, num_hidden_layers=64, layer_types=kinds)
        config.hidden_size, config.head_dim = heads, 1  # no decay depends on them
        tensor = MiniMaxLightningAttention(config, layer).get_buffer(decay).to(tensor).contiguous()
    yield name, tensor
