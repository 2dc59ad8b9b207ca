"""Attention of a ragged step over a paged pool of keys and values, and the store that fills the pool.

Shape legend: T tokens of a step, S sequences, H query heads, G key/value heads, Dk and Dv head widths, B blocks of the
pool, P tokens per block, M blocks per table. A token's slot in the pool is `block * P + offset`.
"""

from __future__ import annotations

import torch

from moiety_kernels import attention_torch


def store(
    keys: torch.Tensor,
    values: torch.Tensor | None,
    key: torch.Tensor,
    value: torch.Tensor | None,
    slots: torch.Tensor,
) -> None:
    """Writes `key` [T, G, Dk] and `value` [T, G, Dv] to their `slots` int64 [T] of the pool.

    `keys` [B, G, P, Dk] and `values` [B, G, P, Dv] are a layer's pool. Where values are the first Dv columns of the
    keys (the latent of MLA) they are not stored: `values` and `value` are None. No slot may occur twice.
    """
    attention_torch.store(keys, key, slots)
    if values is not None and value is not None:
        attention_torch.store(values, value, slots)


@torch.no_grad()
def paged_attention(
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
) -> torch.Tensor:
    """Each token of `query` [T, H, Dk] over its sequence's past: [T, H, Dv], in the query's dtype.

    Token t sees the first `length[t]` (int32 [T], at least 1: itself) positions of sequence `sequence[t]` (int32 [T]),
    less those that a sliding `window` or an attention `chunk` (in tokens) hides. Position p of sequence s lies in block
    `tables[s, p // P]` (int32 [S, M]) of `keys` [B, G, P, Dk] and `values` [B, G, P, Dv]; entries behind the last
    position, or before the first that is visible, are never used. `values` may be a view of the first columns of
    `keys`. `sinks` [H] are scores that take part in the softmax only; `softcap` bounds scores by a tanh.

    Tokens of one sequence should lie side by side: they are then computed together and read its blocks once.
    `sequence` and `length` are read on the host; on other devices each of them kept there saves a wait.
    """
    return attention_torch.paged_attention(
        query,
        keys,
        values,
        tables,
        sequence,
        length,
        scale=scale,
        window=window,
        chunk=chunk,
        sinks=sinks,
        softcap=softcap,
    )
