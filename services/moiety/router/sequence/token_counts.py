"""Token counts for repetition, presence and frequency penalties. Only new tokens are counted at each step."""

from __future__ import annotations

from collections import abc

import numpy as np


class TokenCounts:
    """The distinct tokens of one sequence, and how often each of them was generated."""

    def __init__(self) -> None:
        self._slots: dict[int, int] = {}
        self._ids = np.empty(64, np.int64)
        self._generated = np.zeros(64, np.float32)
        self._followed = 0

    @property
    def ids(self) -> np.ndarray:
        """Ids of the distinct tokens of prompt and output, an int64 vector."""
        return self._ids[: len(self._slots)]

    @property
    def generated(self) -> np.ndarray:
        """How often each token of `ids` occurs in the output, a float32 vector."""
        return self._generated[: len(self._slots)]

    def follow(self, tokens: abc.Sequence[int], prompt_tokens: int) -> None:
        """Counts the tokens that `tokens` (the prompt, then the output) has gained since the last call."""
        if self._followed == 0:
            prompt = np.unique(np.asarray(tokens[:prompt_tokens], np.int64))
            self._slots = {token: slot for slot, token in enumerate(prompt.tolist())}
            self._ids = np.concatenate([prompt, self._ids])
            self._generated = np.concatenate([np.zeros(len(prompt), np.float32), self._generated])
            self._followed = prompt_tokens
        for token in tokens[self._followed :]:
            slot = self._slots.setdefault(token, len(self._slots))
            if slot == len(self._ids):
                self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
                self._generated = np.concatenate([self._generated, np.zeros_like(self._generated)])
            self._ids[slot] = token
            self._generated[slot] += 1
        self._followed = len(tokens)
