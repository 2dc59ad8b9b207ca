"""The prompt of a request, in the form that choosing a router needs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moiety.gateway.prefixes import PrefixHasher
from moiety.internal.v1 import engine_pb2


class Prompt:
    """The token ids to compute before the next token, including those that a lost router generated."""

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
        """Returns the hashes of its blocks (PrefixHasher.hashes), computed once for each block size."""
        if (found := self._hashes.get(block_tokens)) is None:
            found = self._hashes[block_tokens] = self._hasher.hashes(self.ids, block_tokens, self._tenant)
        return found

    def hashes_with(self, generated: Sequence[int], block_tokens: int) -> Sequence[int]:
        """Returns the hashes of its blocks and those that `generated` has filled: the start of a conversation's next turn."""
        ids = np.concatenate((self.ids, np.array(generated, dtype=np.uint32)))
        return self._hasher.hashes(ids, block_tokens, self._tenant)
