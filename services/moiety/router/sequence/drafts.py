"""Speculative decoding by prompt lookup: drafts copied from a sequence's own text, and the exact rule to accept them.

Text repeats itself: what followed the last occurrence of the newest tokens is a fair guess at what follows them now
(LLMA, arXiv:2304.04487). A step computes a sequence's next token and its drafts at once. The noise of a sampled token is
a function of seed, choice and position only, so sampling each position from its own logits gives exactly the token that
decoding one by one would give there, at any temperature, as long as all before it are right. No token ever changes; a
wrong draft costs its share of the step.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST, SHORTEST = 4, 2  # tokens that must match; a single one says too little
PAUSE = 16  # tokens without drafts once drafts failed, doubled each time they fail again


class Drafter:
    """The drafts of one sequence: an index of what it said, and how well drafts have done."""

    def __init__(self, most: int):
        """At most `most` drafts a step, at least 1."""
        self._most, self._length = most, min(2, most)
        self._pause, self._resume = PAUSE, 0
        self._follows: dict[tuple[int, ...], int] = {}  # n-gram -> where its latest occurrence ended
        self._indexed = 0  # tokens whose n-grams are in the index

    def draft(self, tokens: Sequence[int], most: int) -> tuple[int, ...]:
        """Up to `most` tokens that may follow `tokens`, which must continue what was given before; often none.

        Costs time in proportion to the tokens that are new, whatever the length of the text.
        """
        wanted = min(self._length, most)
        if wanted < 1 or len(tokens) < self._resume:
            return ()
        self._index(tokens)
        for width in range(LONGEST, SHORTEST - 1, -1):
            if (at := self._follows.get(tuple(tokens[-width:]))) is not None:
                # A match that reaches the end repeats itself: copying goes on with what it has copied.
                period = len(tokens) - at
                return tuple(tokens[at + i % period] for i in range(wanted))
        return ()

    def learn(self, drafted: int, accepted: int, tokens: int) -> None:
        """`accepted` of `drafted` drafts were right; the sequence has `tokens` tokens now.

        All right: twice as many next time. None right: half as many, and none for a while once that is less than one.
        """
        if not drafted:
            return
        if accepted == drafted:
            self._length = min(2 * self._length, self._most)
        else:
            self._length = accepted + 1 if accepted else self._length // 2
        if accepted:
            self._pause = PAUSE
        elif self._length < 1:
            self._length, self._resume = 1, tokens + self._pause
            self._pause *= 2

    def _index(self, tokens: Sequence[int]) -> None:
        """Every n-gram but those that end the text: an occurrence is worth nothing before something follows it."""
        for end in range(max(self._indexed, SHORTEST), len(tokens)):
            for width in range(SHORTEST, min(LONGEST, end) + 1):
                self._follows[tuple(tokens[end - width : end])] = end
        self._indexed = len(tokens)


def accepted(drafts: Sequence[int], sampled: Sequence[int]) -> int:
    """How many leading `drafts` are the tokens that were `sampled` in their places.

    `sampled[i]` was sampled behind `drafts[:i]`, so that the first `accepted + 1` of `sampled` are the sequence's own.
    """
    for at, (draft, token) in enumerate(zip(drafts, sampled, strict=False)):
        if draft != token:
            return at
    return min(len(drafts), len(sampled))
