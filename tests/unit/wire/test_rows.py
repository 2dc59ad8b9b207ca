"""Row buffers: views of memory that others own, and the copies between them."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
import pytest
import torch

from moiety.wire.rows import RowBuffer, SelectedRows, copy_rows


def numbered(rows: int) -> torch.Tensor:
    """[rows, 6] of distinct values."""
    return torch.arange(6.0 * rows).view(rows, 6)


@pytest.mark.parametrize(
    ("chosen", "places"),
    [(None, None), ([4, 0, 0, 2], None), (None, [3, 1, 4, 0, 2]), ([2, 2, 1], [4, 0, 3])],
    ids=["all in order", "gather", "scatter", "both"],
)
def test_copies_are_those_of_indexing(chosen: list[int] | None, places: list[int] | None):
    """Row chosen[i] goes to places[i]; rows without an index keep their values."""
    source = numbered(5)
    picked = source if chosen is None else source[chosen]
    target = torch.full((len(picked) if places is None else 5, 6), -1.0)
    expected = target.clone()
    expected[slice(None) if places is None else places] = picked
    copy_rows(
        RowBuffer.of(source),
        RowBuffer.of(target),
        chosen=None if chosen is None else np.array(chosen),
        places=None if places is None else np.array(places),
    )
    assert torch.equal(target, expected)


def test_a_buffer_is_the_memory_it_was_made_of():
    """Device, address and sizes are those of the tensor, so that native code reads and writes the same bytes."""
    tensor = numbered(3)
    buffer = RowBuffer.of(tensor[1:])
    assert (buffer.device, buffer.row_bytes, buffer.nbytes, len(buffer)) == (str(tensor.device), 24, 48, 2)
    ctypes.memset(buffer.address, 0, buffer.row_bytes)
    assert tensor.sum(1).tolist() == [15, 0, 87]


def test_rows_within_a_segment_begin_where_they_should():
    """Rows in shared memory are written in place, at any byte offset, and nothing around them changes."""
    segment = mmap.mmap(-1, 64)
    copy_rows(RowBuffer.of(torch.ones(2, 6, dtype=torch.uint8)), RowBuffer.within(segment, 6, rows=2, start=5))
    assert segment[:] == bytes(5) + b"\1" * 12 + bytes(47)


def test_selected_rows_are_gathered_on_demand():
    """Selected rows know their size, and `gathered` copies them."""
    selected = SelectedRows(RowBuffer.of(numbered(4)), np.array([3, 1, 1]))
    assert selected.nbytes == 72
    assert selected.gathered().host.tobytes() == numbered(4)[[3, 1, 1]].numpy().tobytes()
