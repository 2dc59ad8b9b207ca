"""Rows on their way between router and experts: buffers in memory that others own, and the one function that copies rows.

Code that computes or moves rows natively, or on a device, needs only a buffer's device, address and sizes. It would
replace `copy_rows`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from mmap import mmap
from typing import NamedTuple

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class RowBuffer:
    """R rows of equal size, one after another. It keeps the owner of the memory alive and never copies by itself.

    NumPy sees a row as one np.void element, which it copies by memcpy, whatever the dtype of the row's values.
    """

    host: np.ndarray  # np.void [R]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> RowBuffer:
        """Returns the rows of a contiguous CPU tensor [R, ...], without a copy."""
        row = row_dtype(math.prod(tensor.shape[1:]) * tensor.itemsize)
        return cls(tensor.detach().view(-1).view(torch.uint8).numpy().view(row))

    @classmethod
    def within(cls, memory: memoryview | mmap, row_bytes: int, rows: int | None = None, start: int = 0) -> RowBuffer:
        """Returns `rows` rows of `row_bytes` bytes that begin at byte `start` of `memory`, by default all, without a copy.

        Rows in read-only memory, such as a received payload, are read-only.
        """
        count = len(memory) // row_bytes if rows is None else rows
        return cls(np.frombuffer(memory, row_dtype(row_bytes), count, start))

    @classmethod
    def empty(cls, rows: int, row_bytes: int) -> RowBuffer:
        """Returns new memory for `rows` rows, not initialised."""
        return cls(np.empty(rows, row_dtype(row_bytes)))

    @property
    def device(self) -> str:
        """The device that holds the memory, as torch names it."""
        return "cpu"

    @property
    def address(self) -> int:
        """Address of the first row. The memory lives as long as this object."""
        return int(self.host.ctypes.data)

    @property
    def row_bytes(self) -> int:
        """Size of one row in bytes."""
        return self.host.itemsize

    @property
    def nbytes(self) -> int:
        """Size of all rows in bytes."""
        return self.host.nbytes

    def __len__(self) -> int:
        return len(self.host)


class SelectedRows(NamedTuple):
    """The rows `order` of `rows`, not gathered yet, so that a transport can copy them straight to their destination."""

    rows: RowBuffer
    order: np.ndarray  # int64 [A], indices into rows

    @property
    def nbytes(self) -> int:
        """Size of the selected rows in bytes."""
        return len(self.order) * self.rows.row_bytes

    def gathered(self) -> RowBuffer:
        """Returns the selected rows in new memory."""
        into = RowBuffer.empty(len(self.order), self.rows.row_bytes)
        copy_rows(self.rows, into, chosen=self.order)
        return into


def copy_rows(
    source: RowBuffer, target: RowBuffer, *, chosen: np.ndarray | None = None, places: np.ndarray | None = None
) -> None:
    """Copies row `chosen[i]` of `source` to row `places[i]` of `target`; without indices, row i.

    Indices are integers [A] and must be in range.
    """
    if places is not None:
        target.host[places] = source.host if chosen is None else source.host[chosen]
    elif chosen is not None:
        source.host.take(chosen, out=target.host, mode="clip")  # mode="raise" would copy through a buffer of numpy's
    else:
        target.host[:] = source.host


@lru_cache(64)
def row_dtype(row_bytes: int) -> np.dtype[np.void]:
    """Returns the NumPy dtype of one row: np.void of `row_bytes` bytes."""
    return np.dtype((np.void, row_bytes))
