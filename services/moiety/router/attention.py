"""The attention function the router registers with transformers: ragged batches over the engine's own KV cache.

A step packs all its sequences in one row, [1, tokens]. Which tokens belong to whom travels in the keyword argument
`moiety_batch`, which transformers hands through to every attention layer.

Legend: H query heads, G key/value heads, n tokens of a segment, P past tokens, Dk and Dv head widths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moiety.router.kvcache import CacheSpec, KVCache, LayerSpec

NAME = "moiety"


@dataclass(frozen=True, slots=True)
class Segment:
    """`count` tokens from `start` on in the packed row, behind `past` tokens of the same sequence."""

    request_id: str
    start: int
    count: int
    past: int


class Batch(Protocol):
    """What `moiety_batch` must offer."""

    segments: Sequence[Segment]

    def extend(
        self, segment: Segment, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


@dataclass(frozen=True, slots=True)
class CachedBatch:
    """A step's segments over the engine's cache."""

    segments: Sequence[Segment]
    cache: KVCache

    def extend(
        self, segment: Segment, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.cache.extend(segment.request_id, layer, segment.past, key, value)


class ProbeBatch:
    """A batch of one token that keeps nothing but the shapes: how the CacheSpec of any model is found out."""

    def __init__(self) -> None:
        self.segments = (Segment("probe", 0, 1, 0),)
        self._layers: dict[int, LayerSpec] = {}

    def extend(
        self, segment: Segment, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._layers[layer] = LayerSpec(key.shape[0], key.shape[2], value.shape[2], key.dtype)
        return key, value

    @property
    def spec(self) -> CacheSpec:
        return CacheSpec(dict(self._layers))


def attend(
    module: Any,  # an attention layer: `layer_idx`, `config`
    query: torch.Tensor,  # [1, H, tokens, Dk]
    key: torch.Tensor,  # [1, G, tokens, Dk]
    value: torch.Tensor,  # [1, G, tokens, Dv]
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,  # [H] attention sinks
    softcap: float | None = None,
    moiety_batch: Batch | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of each segment over its own past; returns [1, tokens, H, Dv]."""
    if moiety_batch is None:
        raise TypeError("the moiety attention function needs the keyword argument moiety_batch")
    layer = module.layer_idx
    window, chunk = _reach(module, layer, sliding_window)
    heads, groups = query.shape[1], key.shape[1]
    output = query.new_empty(1, query.shape[2], heads, value.shape[-1])
    for segment in moiety_batch.segments:
        rows = slice(segment.start, segment.start + segment.count)
        keys, values = moiety_batch.extend(segment, layer, key[0, :, rows], value[0, :, rows])
        first = _first_seen(segment, window, chunk)
        keys, values = keys[:, first:], values[:, first:]
        # Query heads of one key/value head side by side as rows: grouped-query attention without repeating K and V.
        packed = query[0, :, rows].reshape(groups, heads // groups * segment.count, -1)
        mask = _mask(segment, first, window, chunk, query.device) if segment.count > 1 else None
        if mask is not None:
            mask = mask.repeat(heads // groups, 1)
        if s_aux is None and softcap is None:
            scores = F.scaled_dot_product_attention(
                packed[None], keys[None], values[None], attn_mask=mask, scale=scaling
            )[0]
        else:
            scores = _plain(packed, keys, values, mask, scaling, s_aux, softcap, segment.count)
        output[0, rows] = scores.view(groups, heads // groups, segment.count, -1).permute(2, 0, 1, 3).flatten(1, 2)
    return output, None


def _reach(module: Any, layer: int, sliding_window: int | None) -> tuple[int | None, int | None]:
    """(sliding window, attention chunk) of this layer, each None where it sees everything."""
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


def _first_seen(segment: Segment, window: int | None, chunk: int | None) -> int:
    """The oldest position that any token of the segment sees."""
    if window is not None:
        return max(0, segment.past - window + 1)
    if chunk is not None:
        return segment.past // chunk * chunk
    return 0


def _mask(segment: Segment, first: int, window: int | None, chunk: int | None, device: torch.device) -> torch.Tensor:
    """[n, P + n - first], True where a token sees a position."""
    end = segment.past + segment.count
    token = torch.arange(segment.past, end, device=device)[:, None]
    position = torch.arange(first, end, device=device)[None]
    mask = position <= token
    if window is not None:
        mask &= position > token - window
    if chunk is not None:
        mask &= position // chunk == token // chunk
    return mask


def _plain(
    query: torch.Tensor,  # [G, H / G * n, Dk]
    keys: torch.Tensor,  # [G, S, Dk]
    values: torch.Tensor,  # [G, S, Dv]
    mask: torch.Tensor | None,
    scaling: float | None,
    sinks: torch.Tensor | None,
    softcap: float | None,
    count: int,
) -> torch.Tensor:
    """Attention with what the fused function lacks: logit soft caps, and sinks that take part in the softmax only."""
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    weights = (query @ keys.transpose(-1, -2)) * scale
    if softcap is not None:
        weights = torch.tanh(weights / softcap) * softcap
    if mask is not None:
        weights = weights.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        sink = sinks.to(weights.dtype).view(keys.shape[0], -1, 1).repeat_interleave(count, 1)
        weights = torch.cat([weights, sink], dim=-1)
    probabilities = weights.float().softmax(-1).to(values.dtype)
    if sinks is not None:
        probabilities = probabilities[..., :-1]
    return probabilities @ values


def register() -> None:
    """Makes `attn_implementation="moiety"` known to transformers; doing so twice is harmless."""
    function: Callable[..., Any] = attend
    ALL_ATTENTION_FUNCTIONS.register(NAME, function)
