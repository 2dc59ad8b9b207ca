"""The attention function that the router registers with transformers: ragged batches over the engine's KV cache.

A step packs all its sequences into one row, [1, T]. The batch of the running forward (`seam.current_batch`) says which
token belongs to which sequence.

Shape legend: T tokens of a step, H query heads, G key/value heads, Dk and Dv head widths, S sequences, M blocks of the
longest table, B blocks of the pool, P tokens per block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moiety.model.seam import current_batch
from moiety.router.cache.cache_spec import LayerSpec
from moiety_kernels.ops.paged_attention import paged_attention
from moiety_kernels.reference.attention import AttentionOptions

NAME = "moiety"


class DiscoveryBatch:
    """A batch of a few tokens that records only shapes.

    After a model has run on this batch, `layers` says what each layer of the model caches per token. The batch also has
    a prompt of one token, which only encoder-decoders use.
    """

    def __init__(self, tokens: int = 1) -> None:
        self.cross = DiscoveryPrompts(tokens)
        self.tables = torch.arange(tokens, dtype=torch.int32)[None]
        self.sequence = torch.zeros(tokens, dtype=torch.int32)
        self.positions = torch.arange(tokens)
        self.length = self.positions.int() + 1
        self.states = None  # state layers run without cached states
        self.layers: dict[int, LayerSpec] = {}

    def sequences(self) -> Iterator[DiscoveryBatch]:
        """Yields itself: all its tokens belong to one sequence."""
        yield self

    def store(
        self,
        layer: int,
        key: torch.Tensor,
        value: torch.Tensor | int,
        window: int | None = None,
        chunk: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Records what the layer caches per token; returns key and value as pools with one block for each token."""
        shared = isinstance(value, int)
        values = key[..., :value] if isinstance(value, int) else value
        self.layers[layer] = LayerSpec(key.shape[1], key.shape[2], values.shape[2], key.dtype, shared, window, chunk)
        return key.unsqueeze(2), values.unsqueeze(2)


class DiscoveryPrompts:
    """The prompt of a DiscoveryBatch, one token long. Records what each decoder layer caches for it."""

    def __init__(self, tokens: int) -> None:
        """`tokens`: number of output tokens that attend to the prompt."""
        self.ids, self.lengths = torch.zeros(1, dtype=torch.long), (1,)
        self.tables = torch.zeros(1, 1, dtype=torch.int32)
        self.length = torch.ones(tokens, dtype=torch.int32)
        self.layers: dict[int, LayerSpec] = {}

    def owners(self, tokens: Sequence[int]) -> list[int]:
        return list(tokens)

    def store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.layers[layer] = LayerSpec(key.shape[1], key.shape[2], value.shape[2], key.dtype)
        return key.unsqueeze(2), value.unsqueeze(2)


def attend(
    module: Any,  # an attention layer: `layer_idx`, `config`
    query: torch.Tensor,  # [1, H, T, Dk]
    key: torch.Tensor,  # [1, G, T, Dk]
    value: torch.Tensor,  # [1, G, T, Dv]
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,  # [H] attention sinks
    softcap: float | None = None,
    distance_bias: torch.Tensor | None = None,  # [H, N], added to the scores by distance in tokens
    shared_values: bool = False,  # value is the first Dv columns of key, so only the key is cached
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Computes causal attention of each token over its own sequence; returns [1, T, H, Dv]."""
    batch, layer = current_batch(), module.layer_idx
    window, chunk = _reach(module, layer, sliding_window)
    stored = value.shape[-1] if shared_values else value[0].transpose(0, 1)
    keys, values = batch.store(layer, key[0].transpose(0, 1), stored, window, chunk)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    options = AttentionOptions(scale, window, chunk, s_aux, softcap, distance_bias)
    output = paged_attention(
        query[0].transpose(0, 1), keys, values, batch.tables, batch.sequence, batch.length, options
    )
    return output.unsqueeze(0), None


def _reach(module: Any, layer: int, sliding_window: int | None) -> tuple[int | None, int | None]:
    """Returns (sliding window, attention chunk) of this layer in tokens, each None where there is no such limit."""
    config = module.config
    kinds = getattr(config, "layer_types", None)
    kind = kinds[layer] if kinds else None
    if kind == "full_attention":
        return None, None
    if kind == "chunked_attention":
        return None, int(config.attention_chunk_size)
    if kind == "sliding_attention" and sliding_window is None:
        return int(config.sliding_window), None
    return sliding_window, None


ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
