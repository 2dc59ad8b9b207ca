"""Paged attention in plain torch, one token at a time: the definition against which every faster path is tested.

Shape legend: T tokens of a step, S sequences, H query heads, G key/value heads, Dk and Dv head widths, B blocks of the
pool, P tokens per block, M blocks per table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """What an attention layer does with its scores, and which positions it hides."""

    scale: float  # of query times key
    window: int | None = None  # a token sees this many tokens, itself included
    chunk: int | None = None  # a token sees only tokens of its own chunk, of this many tokens
    sinks: torch.Tensor | None = None  # [H]: one more score per head in the softmax, without a value
    softcap: float | None = None  # replaces each score s by softcap * tanh(s / softcap)
    bias: torch.Tensor | None = None  # float32 [H, N]: column min(n, N - 1) is added to the score n tokens back


def first_visible(length: int, window: int | None, chunk: int | None) -> int:
    """Returns the oldest position that the token at position `length - 1` sees."""
    first = 0
    if window is not None:
        first = max(first, length - window)
    if chunk is not None:
        first = max(first, (length - 1) // chunk * chunk)
    return first


def paged_attention_reference(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    sequence: torch.Tensor,
    length: torch.Tensor,
    options: AttentionOptions,
) -> torch.Tensor:
    """Computes `ops.paged_attention.paged_attention` in float64 where the query is float64, else in float32."""
    groups, page = keys.shape[1:3]
    wide = torch.promote_types(query.dtype, torch.float32)
    output = query.new_empty(query.shape[0], query.shape[1], values.shape[-1])
    for token, (row, end) in enumerate(zip(sequence.tolist(), length.tolist(), strict=True)):
        seen = torch.arange(first_visible(end, options.window, options.chunk), end, device=keys.device)
        block = tables[row].to(keys.device)[seen // page].long()
        key = keys[block, :, seen % page].to(wide)  # [L, G, Dk]
        value = values[block, :, seen % page].to(wide)  # [L, G, Dv]
        heads = query[token].to(wide).view(groups, -1, query.shape[-1])  # [G, H / G, Dk]
        scores = torch.einsum("grd,lgd->grl", heads, key) * options.scale
        if options.softcap is not None:
            scores = torch.tanh(scores / options.softcap) * options.softcap
        if (bias := options.bias) is not None:
            distance = (end - 1 - seen).clamp(max=bias.shape[1] - 1)
            scores = scores + bias.to(wide)[:, distance].view(groups, -1, len(seen))
        if (sinks := options.sinks) is not None:  # one more score per head, without a value
            scores = torch.cat([scores, sinks.to(wide).view(groups, -1, 1)], dim=-1)
        probabilities = scores.softmax(-1)[..., : len(seen)]
        output[token] = torch.einsum("grl,lgd->grd", probabilities, value).flatten(0, 1).to(output.dtype)
    return output
