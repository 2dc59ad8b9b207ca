"""Attention of a ragged step over a paged pool of keys and values, and the store that fills the pool.

Shape legend: T tokens of a step, S sequences, H query heads, G key/value heads, Dk and Dv head widths, B blocks of the
pool, P tokens per block, M blocks per table. A token's slot in the pool is `block * P + offset`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from moiety_kernels.cpu.calls import AttentionCall, StoreCall
from moiety_kernels.cpu.library import load
from moiety_kernels.ops import paged_attention_torch
from moiety_kernels.reference.attention import AttentionOptions
from moiety_kernels.threads import thread_limit


def store(
    keys: torch.Tensor,
    values: torch.Tensor | None,
    key: torch.Tensor,
    value: torch.Tensor | None,
    slots: torch.Tensor,
) -> None:
    """Writes `key` [T, G, Dk] and `value` [T, G, Dv] to the `slots` (int64 [T]) of a layer's pool.

    The pool is `keys` [B, G, P, Dk] and `values` [B, G, P, Dv], in the dtype of `key`. Where the values are the first Dv
    columns of the keys (the latent of MLA), `values` and `value` are None. No slot may occur twice.
    """
    _store(keys, key, slots)
    if values is not None and value is not None:
        _store(values, value, slots)


def paged_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    sequence: torch.Tensor,
    length: torch.Tensor,
    options: AttentionOptions,
) -> torch.Tensor:
    """Returns the attention [T, H, Dv] of each token of `query` [T, H, Dk] over its sequence, in the query's dtype.

    Token t sees the first `length[t]` (int32 [T], at least 1: itself) positions of sequence `sequence[t]` (int32 [T]),
    except those that a window or a chunk hides. Position p of sequence s lies in block `tables[s, p // P]` (int32 [S, M])
    of `keys` [B, G, P, Dk] and `values` [B, G, P, Dv]. Table entries after the last position or before the first visible
    one are not used. `values` may be a view of the first columns of `keys`.

    Tokens of one sequence should be adjacent, so that they are computed together. The bits that the C++ kernel gives a
    token do not depend on the call's other tokens; those that torch gives may. `sequence` and `length` should be on the
    host, where they are read. Raises ValueError if `tables`, `sequence` or `length` is not contiguous int32.
    """
    for name, index in (("tables", tables), ("sequence", sequence), ("length", length)):
        if index.dtype != torch.int32 or not index.is_contiguous():
            raise ValueError(f"{name} is {index.dtype} with strides {index.stride()}: must be contiguous int32")
    kernel = _attention_kernel(query.dtype) if query.device.type == "cpu" else None
    if kernel is None or keys.dtype != query.dtype or values.dtype != query.dtype:
        return paged_attention_torch.paged_attention(query, keys, values, tables, sequence, length, options)
    query = query if query.stride(2) == 1 else query.contiguous()
    sinks, bias = (None if part is None else part.float().contiguous() for part in (options.sinks, options.bias))
    tokens, heads, key_width = query.shape
    groups, page, value_width = values.shape[1:]
    output = query.new_empty(tokens, heads, value_width)
    query_token, query_head, _ = query.stride()
    key_block, key_group, key_position, _ = keys.stride()
    value_block, value_group, value_position, _ = values.stride()
    kernel(
        query=query.data_ptr(),
        keys=keys.data_ptr(),
        values=values.data_ptr(),
        output=output.data_ptr(),
        tables=tables.data_ptr(),
        sequence=sequence.data_ptr(),
        length=length.data_ptr(),
        sinks=None if sinks is None else sinks.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        biases=0 if bias is None else bias.shape[1],
        query_token=query_token,
        query_head=query_head,
        key_block=key_block,
        key_group=key_group,
        key_position=key_position,
        value_block=value_block,
        value_group=value_group,
        value_position=value_position,
        table_row=tables.shape[1],
        tokens=tokens,
        heads=heads,
        groups=groups,
        key_width=key_width,
        value_width=value_width,
        page=page,
        window=options.window or 0,
        chunk=options.chunk or 0,
        element_bytes=query.itemsize,
        threads=thread_limit(),
        scale=options.scale,
        softcap=options.softcap or 0.0,
    )
    return output


def _store(pool: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor) -> None:
    """Writes `rows` [T, G, D] to their `slots` (int64 [T]) of `pool` [B, G, P, D], in C++ or torch."""
    kernel = _store_kernel() if pool.device.type == "cpu" else None
    if kernel is None or rows.dtype != pool.dtype:
        return paged_attention_torch.store(pool, rows, slots)
    rows = rows if rows.stride(2) == 1 else rows.contiguous()
    size = pool.itemsize
    block, group, position, _ = pool.stride()
    token, head, _ = rows.stride()
    kernel(
        pool=pool.data_ptr(),
        rows=rows.data_ptr(),
        slots=slots.data_ptr(),
        block=block * size,
        group=group * size,
        position=position * size,
        row_token=token * size,
        row_group=head * size,
        tokens=rows.shape[0],
        groups=rows.shape[1],
        bytes=rows.shape[2] * size,
        page=pool.shape[2],
    )


def _attention_kernel(dtype: torch.dtype) -> Callable[..., None] | None:
    """Returns the C++ function that computes `paged_attention` in `dtype`; None if there is none."""
    if dtype not in (torch.float32, torch.bfloat16) or (library := load()) is None:
        return None
    return library.function("moiety_paged_attention", AttentionCall)


def _store_kernel() -> Callable[..., None] | None:
    """Returns the C++ function that writes rows to a paged pool; None if the C++ library cannot be used."""
    return None if (library := load()) is None else library.function("moiety_paged_store", StoreCall)
