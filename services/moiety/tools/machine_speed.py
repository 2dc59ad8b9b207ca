"""Measures the highest speeds at which this machine reads memory and multiplies matrices.

The benchmarks compute the floor of a decode step, an estimate of its least time, from these speeds.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from moiety.tools.machine import last_level_cache_bytes
from moiety_kernels.threads import usable_cores

LEAST_READ_BYTES = 512 << 20
CACHES_READ = 3  # bytes to read, as a multiple of the last-level cache, so that little of them can stay cached
MOST_READ_BYTES = 2 << 30
MATRIX = 1024
REPEATS = 5
ROW = 1 << 14  # float32 values per row of the matrix that is read


@dataclass(frozen=True, slots=True)
class MachineSpeed:
    """The best speeds of several tries, on all cores that this process may use."""

    read_bytes_per_s: float  # from memory, in huge pages where the kernel gives them
    bfloat16_flops: float  # per second, in a square matrix product
    float32_flops: float

    def flops(self, dtype: str) -> float:
        """Returns the operations per second of a matrix product in `dtype`. For float16 this is the rate of bfloat16."""
        return self.float32_flops if dtype == "float32" else self.bfloat16_flops


def measure_speed() -> MachineSpeed:
    """Measures this machine's speeds. Takes a second or two, and 0.5 to 2 GiB of memory."""
    with _all_cores():
        return MachineSpeed(_read_rate(), _matrix_rate(torch.bfloat16), _matrix_rate(torch.float32))


def _read_rate() -> float:
    size = min(max(CACHES_READ * (last_level_cache_bytes() or 0), LEAST_READ_BYTES), MOST_READ_BYTES)
    size -= size % (ROW * 4)
    with mmap.mmap(-1, size) as pages:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            pages.madvise(mmap.MADV_HUGEPAGE)
        matrix = torch.frombuffer(pages, dtype=torch.float32).view(-1, ROW)
        matrix.fill_(1.0)
        vector = torch.ones(ROW)
        # Both operations do little else than read. Which one is faster depends on the processor.
        fastest = min(_fastest(partial(torch.mv, matrix, vector)), _fastest(matrix.sum))
        del matrix  # it points into the mapping, which could not be closed otherwise
    return size / fastest


def _matrix_rate(dtype: torch.dtype) -> float:
    left, right = torch.ones(MATRIX, MATRIX, dtype=dtype), torch.ones(MATRIX, MATRIX, dtype=dtype)
    return 2 * MATRIX**3 / _fastest(lambda: left @ right)


def _fastest(action: Callable[[], object]) -> float:
    """Calls `action` REPEATS times and returns the seconds of the fastest call."""
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    return min(times)


@contextmanager
def _all_cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(usable_cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)
