"""Paged attention in plain torch, one token at a time: the definition against which every faster path is tested.

Shape legend: T tokens of a step, S sequences, H query heads, G key/value heads, Dk and Dv head widths, B blocks of the
pool, P tokens per block, M blocks per table.
"""

from __future__ import annotations

import torch


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
    *,
    scale: float,
    window: int | None = None,
    chunk: int | None = None,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes `ops.paged_attention.paged_attention` in float64 where the query is float64, else in float32."""
    groups, page = keys.shape[1:3]
    wide = torch.promote_types(query.dtype, torch.float32)
    output = query.new_empty(query.shape[0], query.shape[1], values.shape[-1])
    for token, (row, end) in enumerate(zip(sequence.tolist(), length.tolist(), strict=True)):
        seen = torch.arange(first_visible(end, window, chunk), end, device=keys.device)
        block = tables[row].to(keys.device)[seen // page].long()
        key = keys[block, :, seen % page].to(wide)  # [L, G, Dk]
        value = values[block, :, seen % page].to(wide)  # [L, G, Dv]
        heads = query[token].to(wide).view(groups, -1, query.shape[-1])  # [G, H / G, Dk]
        scores = torch.einsum("grd,lgd->grl", heads, key) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if bias is not None:
            distance = (end - 1 - seen).clamp(max=bias.shape[1] - 1)
            scores = scores + bias.to(wide)[:, distance].view(groups, -1, len(seen))
        if sinks is not None:  # one more score per head, which takes its share of the softmax and has no value
            scores = torch.cat([scores, sinks.to(wide).view(groups, -1, 1)], dim=-1)
        probabilities = scores.softmax(-1)[..., : len(seen)]
        output[token] = torch.einsum("grl,lgd->grd", probabilities, value).flatten(0, 1).to(output.dtype)
    return output
