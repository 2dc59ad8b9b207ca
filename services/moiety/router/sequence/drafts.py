"""Speculative decoding by prompt lookup: drafts copied from a sequence's own text, and the exact rule to accept them.

Text repeats itself: what followed the newest tokens when they occurred before is likely to follow them again
(LLMA, arXiv:2304.04487). A step computes a sequence's next token and its drafts at once. The noise of a sampled token is
a function of seed, choice and position only. So sampling each position from its own logits gives the token that
decoding one by one would give, at any temperature, as long as all drafts before it are right. Apart from rounding in
the logits, drafts do not change the output. A wrong draft costs its share of the step.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST, SHORTEST = 4, 2  # tokens that must match; a single one predicts too little
PAUSE = 16  # tokens without drafts after drafts failed, doubled with each further failure


class Drafter:
    """Drafts tokens for one sequence: keeps an index of its n-grams and how well its drafts have done."""

    def __init__(self, most: int):
        """`most`: the most drafts in a step, at least 1."""
        self._most, self._length = most, min(2, most)
        self._pause, self._resume = PAUSE, 0
        self._follows: dict[tuple[int, ...], int] = {}  # n-gram -> where its latest occurrence ended
        self._indexed = 0  # tokens whose n-grams are in the index

    def draft(self, tokens: Sequence[int], most: int) -> tuple[int, ...]:
        """Returns up to `most` tokens that may follow `tokens`; often none, and none before `index` has reached their end."""
        wanted = min(self._length, most)
        if wanted < 1 or len(tokens) < self._resume or self._indexed < len(tokens):
            return ()
        for width in range(LONGEST, SHORTEST - 1, -1):
            if (at := self._follows.get(tuple(tokens[-width:]))) is not None:
                # Copying that reaches the end of the text goes on with what it has copied: tokens[at:] repeats.
                period = len(tokens) - at
                return tuple(tokens[at + i % period] for i in range(wanted))
        return ()

    def learn(self, drafted: int, accepted: int, tokens: int) -> None:
        """Adapts the number of drafts after `accepted` of `drafted` were right; the sequence now has `tokens` tokens.

        The number doubles, up to the most in a step, if all were right. If only some were, it becomes `accepted` + 1.
        If none was, it halves. Where it would fall below one, it becomes one, after a pause without drafts.
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

    def index(self, tokens: Sequence[int], most: int) -> int:
        """Indexes up to `most` further tokens of `tokens`, which must begin with those of the previous call; returns how many.

        The n-grams at the end of the text are left out, because no token follows them yet.
        """
        before, until = self._indexed, min(len(tokens), self._indexed + most)
        for end in range(max(before, SHORTEST), until):
            for width in range(SHORTEST, min(LONGEST, end) + 1):
                self._follows[tuple(tokens[end - width : end])] = end
        self._indexed = until
        return until - before


def accepted(drafts: Sequence[int], sampled: Sequence[int]) -> int:
    """Returns how many leading `drafts` equal the tokens `sampled` at their positions.

    `sampled[i]` was sampled after `drafts[:i]`, so the first `accepted + 1` of `sampled` belong to the output.
    """
    for at, (draft, token) in enumerate(zip(drafts, sampled, strict=False)):
        if draft != token:
            return at
    return min(len(drafts), len(sampled))
