"""What a request starts from, in the form that the choice of a router needs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moiety.gateway.prefixes import PrefixHasher
from moiety.internal.v1 import engine_pb2


class Prompt:
    """The token ids to be computed before the next token, those of a lost router among them."""

    def __init__(self, request: engine_pb2.EngineRequest, hasher: PrefixHasher):
        self.ids = np.array(request.prompt_ids, dtype=np.uint32)  # [n]
        if request.generated_ids:
            self.ids = np.concatenate((self.ids, np.array(request.generated_ids, dtype=np.uint32)))
        self.tokens = len(self.ids)
        self.sequences = request.sampling.n or 1
        self.max_tokens = request.sampling.max_tokens - len(request.generated_ids)
        self._hasher, self._tenant = hasher, request.tenant
        self._hashes: dict[int, Sequence[int]] = {}

    def hashes(self, block_tokens: int) -> Sequence[int]:
        """Of its blocks (PrefixHasher.hashes); computed once for each size of block, and routers have one."""
        if (found := self._hashes.get(block_tokens)) is None:
            found = self._hashes[block_tokens] = self._hasher.hashes(self.ids, block_tokens, self._tenant)
        return found

    def hashes_with(self, generated: Sequence[int], block_tokens: int) -> Sequence[int]:
        """Of its blocks and those that `generated` has filled: what the next turn of a conversation starts with."""
        ids = np.concatenate((self.ids, np.array(generated, dtype=np.uint32)))
        return self._hasher.hashes(ids, block_tokens, self._tenant)
