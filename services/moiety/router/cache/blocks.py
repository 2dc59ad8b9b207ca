"""Tracks which sequences hold which block of the KV cache, and which blocks can be reused. It has no tensors.

A block is *held* by one or more sequences, *cached* (no sequence holds it, but its digest is known, so that a later
sequence may reuse its tokens) or *free*. A new block is a free one, else the least recently used cached one.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

_DIGEST_BYTES = 32  # collisions are infeasible to find, so equal digests mean equal tokens


def root(revision: str, tenant: str) -> bytes:
    """Returns the digest of the empty prefix, from which the digests of a tenant's blocks are chained.

    The digest depends on revision and tenant, so different revisions or tenants share no blocks.
    """
    return blake2b(f"{len(revision)}:{revision}{tenant}".encode(), digest_size=_DIGEST_BYTES).digest()


def chained(before: bytes, tokens: Sequence[int]) -> bytes:
    """Returns the digest of a block of `tokens` that follows the prefix with the digest `before`."""
    return blake2b(array("I", tokens).tobytes(), key=before, digest_size=_DIGEST_BYTES).digest()


class BlockTable:
    """The blocks of one sequence in order: `ids[first:count]`. Blocks before `first` fell out of every layer's window.

    For a model with states, the table also has the sequence's state slot: see `state_slots.py`.
    """

    __slots__ = ("count", "digests", "first", "ids", "named", "slot")

    def __init__(self) -> None:
        self.ids: npt.NDArray[np.int32] = np.zeros(8, np.int32)
        self.first = self.count = 0
        self.named = 0  # leading full blocks whose digests are registered for reuse
        self.slot: int | None = None
        self.digests: list[bytes] = []  # of leading full blocks, computed on demand; they stay valid

    @property
    def held(self) -> Sequence[int]:
        """The blocks that the sequence holds."""
        held: list[int] = self.ids[self.first : self.count].tolist()
        return held

    @property
    def size(self) -> int:
        """The number of blocks that the sequence holds."""
        return self.count - self.first

    def append(self, block: int) -> None:
        if self.count == len(self.ids):
            self.ids = np.concatenate([self.ids, np.zeros_like(self.ids)])
        self.ids[self.count] = block
        self.count += 1

    def clear(self) -> None:
        """Empties the table, after the cache has released its blocks and slot.

        Keeps the digests, which depend on the tokens only.
        """
        self.ids[: self.count] = 0
        self.first = self.count = self.named = 0
        self.slot = None


class BlockPool:
    """A pool of `blocks` blocks, numbered from 0, with reference counts and digests."""

    def __init__(self, blocks: int):
        self.blocks = blocks
        self._references = [0] * blocks
        self._free = list(range(blocks - 1, -1, -1))  # a stack, so that memory already touched is reused first
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._by_digest: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """Number of blocks that no sequence holds."""
        return len(self._free) + len(self._cached)

    def take(self) -> int:
        """Takes a block with one reference and without a digest. Call only if `available` is not 0."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            del self._by_digest[self._digest_of.pop(block)]
        self._references[block] = 1
        return block

    def hold(self, block: int) -> None:
        """Adds a reference to a held or cached block."""
        if self._references[block] == 0:
            del self._cached[block]
        self._references[block] += 1

    def release(self, block: int) -> None:
        """Removes a reference. A block without references is cached if it has a digest, otherwise free."""
        self._references[block] -= 1
        if self._references[block] == 0:
            if block in self._digest_of:
                self._cached[block] = None
            else:
                self._free.append(block)

    def references(self, block: int) -> int:
        """Returns how many tables hold this block."""
        return self._references[block]

    def name(self, block: int, digest: bytes) -> None:
        """Lets `find` return this held block for `digest`, unless the digest or the block is registered already."""
        if digest not in self._by_digest and block not in self._digest_of:
            self._by_digest[digest] = block
            self._digest_of[block] = digest

    def find(self, digest: bytes) -> int | None:
        """Returns the held or cached block with this digest; None if there is none."""
        return self._by_digest.get(digest)

    def check(self, held: Iterable[int]) -> None:
        """Raises RuntimeError unless each block is free, cached, or held exactly as often as it occurs in `held`."""
        counted = Counter(held)
        free = Counter(self._free)
        for block in range(self.blocks):
            places = free[block] + (block in self._cached) + (self._references[block] > 0)
            if places != 1:
                raise RuntimeError(f"KV block {block} is in {places} of the states free, cached and held, not in one")
            if self._references[block] != counted[block]:
                count = self._references[block]
                raise RuntimeError(
                    f"KV block {block} counts {count} references, and tables hold it {counted[block]} times"
                )
        named = {block: digest for digest, block in self._by_digest.items()}
        if named != self._digest_of or any(self._cached.keys() - named.keys()) or not named.keys().isdisjoint(free):
            raise RuntimeError("the digest indices of KV blocks contradict one another")
