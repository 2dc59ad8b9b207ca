"""Who holds which block of the KV cache, and which blocks hold known tokens. Numbers only: no tensors here.

A block is *held* by one or more sequences, *cached* (nobody's, but its tokens are known by their digest and may be asked
for again) or *free*. New blocks come from the free ones first, then from the cached ones, least recently used first.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

_DIGEST_BYTES = 32  # nobody finds two prefixes of one digest, so equal digests are equal tokens


def root(revision: str, tenant: str) -> bytes:
    """Where the digests of a tenant's prefixes begin: other revisions and tenants never share a block."""
    return blake2b(f"{len(revision)}:{revision}{tenant}".encode(), digest_size=_DIGEST_BYTES).digest()


def chained(before: bytes, tokens: Sequence[int]) -> bytes:
    """The digest of a block of `tokens` behind all that `before` stands for."""
    return blake2b(array("I", tokens).tobytes(), key=before, digest_size=_DIGEST_BYTES).digest()


class BlockTable:
    """The blocks of one sequence in order: `ids[first:count]`; those before `first` fell out of every layer's window.

    And, where the model keeps states of a sequence, its slot among them: see `state_slots.py`.
    """

    __slots__ = ("count", "digests", "first", "ids", "named", "slot")

    def __init__(self) -> None:
        self.ids: npt.NDArray[np.int32] = np.zeros(8, np.int32)
        self.first = self.count = 0
        self.named = 0  # leading blocks that were full and therefore offered to others
        self.slot: int | None = None
        self.digests: list[bytes] = []  # of the sequence's leading full blocks, as far as anybody asked; never wrong

    @property
    def held(self) -> Sequence[int]:
        """The blocks that are the sequence's."""
        held: list[int] = self.ids[self.first : self.count].tolist()
        return held

    def append(self, block: int) -> None:
        if self.count == len(self.ids):
            self.ids = np.concatenate([self.ids, np.zeros_like(self.ids)])
        self.ids[self.count] = block
        self.count += 1

    def clear(self) -> None:
        """Forgets the blocks; what is known of the tokens stays."""
        self.ids[: self.count] = 0
        self.first = self.count = self.named = 0
        self.slot = None


class BlockPool:
    """`blocks` blocks, numbered from 0, with reference counts and digests."""

    def __init__(self, blocks: int):
        self.blocks = blocks
        self._references = [0] * blocks
        self._free = list(range(blocks - 1, -1, -1))  # a stack: memory that was touched is used again first
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._by_digest: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free) + len(self._cached)

    def take(self) -> int:
        """A block with one reference, its former tokens forgotten. Only while `available`."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            del self._by_digest[self._digest_of.pop(block)]
        self._references[block] = 1
        return block

    def hold(self, block: int) -> None:
        """One more reference to a block that is held or cached."""
        if self._references[block] == 0:
            del self._cached[block]
        self._references[block] += 1

    def give_back(self, block: int) -> None:
        """One reference less; the last one frees the block, or leaves it cached."""
        self._references[block] -= 1
        if self._references[block] == 0:
            if block in self._digest_of:
                self._cached[block] = None
            else:
                self._free.append(block)

    def is_held(self, block: int) -> bool:
        return self._references[block] > 0

    def name(self, block: int, digest: bytes) -> None:
        """From now on `find(digest)` is this held block, unless another one has the same tokens already."""
        if digest not in self._by_digest and block not in self._digest_of:
            self._by_digest[digest] = block
            self._digest_of[block] = digest

    def find(self, digest: bytes) -> int | None:
        """The held or cached block with these tokens."""
        return self._by_digest.get(digest)

    def check(self, held: Iterable[int]) -> None:
        """Raises RuntimeError unless every block is free, cached, or held as often as it occurs in `held`."""
        counted = Counter(held)
        free = Counter(self._free)
        for block in range(self.blocks):
            places = free[block] + (block in self._cached) + (self._references[block] > 0)
            if places != 1:
                raise RuntimeError(f"KV block {block} is free, cached or held {places} times over")
            if self._references[block] != counted[block]:
                found = counted[block]
                raise RuntimeError(f"KV block {block} has {self._references[block]} references, of which {found} exist")
        named = {block: digest for digest, block in self._by_digest.items()}
        if named != self._digest_of or any(self._cached.keys() - named.keys()) or not named.keys().isdisjoint(free):
            raise RuntimeError("the digests of KV blocks contradict one another")
