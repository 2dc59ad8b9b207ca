"""The prompt of a request, with the lengths and block hashes by which a router is chosen for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moiety.gateway.routers.prefixes import PrefixHasher
from moiety.internal.v1 import engine_pb2


class Prompt:
    """The token ids that a router computes before it generates: the prompt, then any tokens that a lost router generated."""

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
        """Returns the hashes of the prompt's blocks (see PrefixHasher.hashes); computes them once for each block size."""
        if (found := self._hashes.get(block_tokens)) is None:
            found = self._hashes[block_tokens] = self._hasher.hashes(self.ids, block_tokens, self._tenant)
        return found

    def hashes_with(self, generated: Sequence[int], block_tokens: int) -> Sequence[int]:
        """Returns the block hashes of the prompt followed by the tokens `generated`.

        The prompt of a conversation's next turn starts with these tokens.
        """
        ids = np.concatenate((self.ids, np.array(generated, dtype=np.uint32)))
        return self._hasher.hashes(ids, block_tokens, self._tenant)
