"""Paged attention in torch operations, for the devices and dtypes without a C++ kernel.

Sequences of similar length with equally many query tokens are copied from the pool into batches of a bounded size, so that
a decode step of many short sequences needs few torch calls. The other tokens of a call may change the rounding of a
token's result.

Shape legend: T tokens of a step, S sequences, H query heads, G key/value heads, Dk and Dv head widths, B blocks of the
pool, P tokens per block, M blocks per table; within a batch N sequences of n query tokens and L positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch.nn import functional

from moiety_kernels.reference.attention import AttentionOptions, first_visible

# A long prefill is cut into segments of this many tokens, so that mask and scores fit in the cache.
_QUERY_TOKENS = 512
# Positions of all sequences of a batch. Larger copies get fresh memory at every call, and its page faults cost more than
# the reads (8 sequences x 1024 positions x 4 KB: 18 ms as one batch, 6 ms as two).
_POSITIONS = 4096


def store(pool: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor) -> None:
    """Writes `rows` [T, G, D] to their `slots` (int64 [T]) of `pool` [B, G, P, D]."""
    page = pool.shape[2]
    pool[slots // page, :, slots % page] = rows


@torch.no_grad()
def paged_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    sequence: torch.Tensor,
    length: torch.Tensor,
    options: AttentionOptions,
) -> torch.Tensor:
    """Computes `ops.paged_attention.paged_attention` in torch, with the same arguments."""
    device, page, groups = query.device, keys.shape[2], keys.shape[1]
    window, chunk, bias = options.window, options.chunk, options.bias
    shared = keys.data_ptr() == values.data_ptr()
    ends = length.tolist()
    length, tables = length.to(device), tables.to(device)
    output = query.new_empty(query.shape[0], query.shape[1], values.shape[-1])
    for segments in _batches(sequence.tolist(), ends, window, chunk):
        tokens = torch.tensor([segment.tokens for segment in segments], device=device)  # [N, n]
        # Whole blocks are read, starting at the one with the oldest position that any token of the segment sees.
        start = torch.tensor([segment.oldest // page for segment in segments], device=device)
        blocks = max(-(-segment.newest // page) - segment.oldest // page for segment in segments)
        column = start[:, None] + torch.arange(blocks, device=device)
        row = torch.tensor([segment.row for segment in segments], device=device)
        table = tables[row[:, None], column.clamp(max=tables.shape[1] - 1)].long().clamp(min=0)  # [N, L / P]
        position = start[:, None] * page + torch.arange(blocks * page, device=device)  # [N, L]
        visible = _visible(position.unsqueeze(1), length[tokens].unsqueeze(2), window, chunk)  # [N, n, L]
        # Unwritten positions may hold NaN, which a mask does not remove. They are few: zeroing only them is cheapest.
        hidden = (~visible.any(1)).nonzero(as_tuple=True)
        key = _gather(keys, table, hidden)
        value = key[..., : values.shape[-1]] if shared else _gather(values, table, hidden)
        # The query heads of one key/value head become adjacent rows: grouped-query attention without repeating K and V.
        count, repeat = tokens.shape[1], query.shape[1] // groups
        heads = query[tokens].view(*tokens.shape, groups, repeat, -1).permute(0, 2, 3, 1, 4).flatten(2, 3)
        mask = visible.repeat(1, repeat, 1).unsqueeze(1)  # [N, 1, H / G * n, L]
        if bias is not None:
            # [N, n, L]
            distance = (length[tokens].unsqueeze(2) - 1 - position.unsqueeze(1)).clamp(0, bias.shape[1] - 1)
            added = bias.to(query.dtype)[:, distance].view(groups, repeat, *distance.shape)
            added = added.permute(2, 0, 1, 3, 4).flatten(2, 3)  # [N, G, H / G * n, L]
            mask = added.masked_fill(~mask, float("-inf"))
        if options.sinks is None and options.softcap is None:
            result = functional.scaled_dot_product_attention(heads, key, value, attn_mask=mask, scale=options.scale)
        else:
            result = _plain(heads, key, value, mask, options)
        result = result.view(len(segments), groups, repeat, count, -1)
        output[tokens] = result.permute(0, 3, 1, 2, 4).flatten(2, 3)
    return output


@dataclass(frozen=True, slots=True)
class _Segment:
    """Query tokens of one sequence; every position that one of the tokens sees lies in [`oldest`, `newest`)."""

    tokens: range
    row: int  # of the tables
    oldest: int
    newest: int


def _batches(
    sequence: Sequence[int], ends: Sequence[int], window: int | None, chunk: int | None
) -> Iterator[list[_Segment]]:
    """Yields lists of segments with equally many query tokens and visible ranges whose sizes are within a factor of 2."""
    segments: list[_Segment] = []
    start = 0
    for row, run in groupby(sequence):
        stop = start + len(list(run))
        for at in range(start, stop, _QUERY_TOKENS):
            tokens = range(at, min(at + _QUERY_TOKENS, stop))
            oldest = min(first_visible(ends[token], window, chunk) for token in tokens)
            segments.append(_Segment(tokens, row, oldest, max(ends[token] for token in tokens)))
        start = stop

    def alike(segment: _Segment) -> tuple[int, int]:
        return len(segment.tokens), (segment.newest - segment.oldest).bit_length()

    for _, group in groupby(sorted(segments, key=alike), alike):
        batch = list(group)
        size = max(1, _POSITIONS // max(segment.newest - segment.oldest for segment in batch))
        for at in range(0, len(batch), size):
            yield batch[at : at + size]


def _visible(position: torch.Tensor, length: torch.Tensor, window: int | None, chunk: int | None) -> torch.Tensor:
    """Returns whether each token, the last of its first `length` [N, n, 1] positions, sees `position` [N, 1, L]: [N, n, L]."""
    visible = position < length
    if window is not None:
        visible &= position >= length - window
    if chunk is not None:
        visible &= position // chunk == (length - 1) // chunk
    return visible


def _gather(pool: torch.Tensor, table: torch.Tensor, hidden: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Copies the blocks of `table` [N, m] out of `pool` [B, G, P, D], with zeros at hidden positions: [N, G, m * P, D]."""
    group = torch.arange(pool.shape[1], device=pool.device)
    index = table.unsqueeze(1) * pool.shape[1] + group[:, None]  # [N, G, m]: a block of one head is copied as one row
    rows = pool.flatten(0, 1).index_select(0, index.flatten()).view(*index.shape[:2], -1, pool.shape[3])
    sequence, position = hidden
    rows[sequence, :, position] = 0
    return rows


def _plain(
    heads: torch.Tensor,  # [N, G, H / G * n, Dk]
    key: torch.Tensor,  # [N, G, L, Dk]
    value: torch.Tensor,  # [N, G, L, Dv]
    mask: torch.Tensor,  # bool [N, 1, H / G * n, L], true where visible; or a bias [N, G, H / G * n, L], added to the scores
    options: AttentionOptions,
) -> torch.Tensor:
    """Computes attention in separate torch operations, with the soft caps and sinks that torch's fused function lacks."""
    scores = (heads @ key.transpose(-1, -2)) * options.scale
    if options.softcap is not None:
        scores = torch.tanh(scores / options.softcap) * options.softcap
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    if (sinks := options.sinks) is not None:
        groups = key.shape[1]
        count = heads.shape[2] * groups // sinks.shape[0]
        sink = sinks.to(scores.dtype).view(1, groups, -1, 1).repeat_interleave(count, 2)
        scores = torch.cat([scores, sink.expand(scores.shape[0], -1, -1, -1)], dim=-1)
    probabilities = scores.float().softmax(-1).to(value.dtype)[..., : key.shape[2]]
    return probabilities @ value
