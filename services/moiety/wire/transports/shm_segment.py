"""Shared memory without a name: a memfd that two processes map, and the allocator of its ranges.

The peer receives the memfd as a file descriptor. The operating system frees the memory once no process maps it, so nothing
remains in /dev/shm when either side is killed. Only written pages take memory, and the lowest ranges are reused first.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from bisect import bisect

from moiety.errors import InvalidRequest

AVAILABLE = hasattr(os, "memfd_create")  # Linux
SEGMENT_BYTES = 256 << 20  # four calls of the largest size, answers included
ALIGNMENT = 64  # a cache line

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW if AVAILABLE else 0


def aligned(size: int) -> int:
    """Returns the least multiple of ALIGNMENT that holds `size` bytes."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def create_segment(size: int = SEGMENT_BYTES) -> tuple[int, mmap.mmap]:
    """Creates a segment that is sealed against resizing; returns its file descriptor and its mapping.

    The caller passes the descriptor to the peer and then closes it.
    """
    descriptor = os.memfd_create("moiety-hop", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    return descriptor, mmap.mmap(descriptor, size)


def map_segment(descriptor: int) -> mmap.mmap:
    """Maps a segment that a peer created. Raises InvalidRequest unless it is sealed and has 1 to SEGMENT_BYTES bytes.

    Without the seal against resizing, a peer could shrink the segment while we use it, and our next access would end this
    process by SIGBUS.
    """
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError:
        seals = 0
    size = os.fstat(descriptor).st_size
    if seals & _SEALS != _SEALS or not 0 < size <= SEGMENT_BYTES:
        raise InvalidRequest(
            "segment", f"{size} bytes, seals {seals:#x}", f"sealed memory of 1 to {SEGMENT_BYTES} bytes"
        )
    return mmap.mmap(descriptor, size)


class Allocator:
    """Allocates the lowest free range of a segment that fits: it was probably used recently and is still in the CPU cache."""

    def __init__(self, size: int):
        self._starts, self._sizes = [0], [size]  # free ranges, ascending, never adjacent

    def allocate(self, size: int) -> int | None:
        """Returns the start of `aligned(size)` free bytes, or None where no free range is that long."""
        size = aligned(size)
        for index, free in enumerate(self._sizes):
            if free >= size:
                start = self._starts[index]
                if free == size:
                    del self._starts[index], self._sizes[index]
                else:
                    self._starts[index] += size
                    self._sizes[index] -= size
                return start
        return None

    def release(self, start: int, size: int) -> None:
        """Frees the range whose start `allocate(size)` returned."""
        size = aligned(size)
        index = bisect(self._starts, start)
        if index < len(self._starts) and start + size == self._starts[index]:
            size += self._sizes[index]
            del self._starts[index], self._sizes[index]
        if index > 0 and self._starts[index - 1] + self._sizes[index - 1] == start:
            self._sizes[index - 1] += size
        else:
            self._starts.insert(index, start)
            self._sizes.insert(index, size)
