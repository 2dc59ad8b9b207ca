"""Which router a request goes to: a pure function of what is known of each, and of a number that the caller draws.

A request goes where it costs least time: a wait for a slot, the prefill of what is not cached behind the prefill already
queued there, and tokens at the pace that so many streams allow; and its own prefill once more, for it keeps those who
come after it waiting as well. So a cached prefix wins until what waits at its router costs more than computing it again.

Only a few routers are compared: two drawn at random, and two of those with the longest prefix. What is known of load is
as old as the last poll, and many gateways that all chose the best of all would choose the same one until the next
(Mitzenmacher, "How Useful Is Old Information?", 2000); two choices keep the balance without that herd.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from moiety.policy.router_pace import Pace


class Candidate(NamedTuple):
    """One router, as one gateway sees it at the moment of the choice."""

    load: int  # requests there, running or waiting
    slots: int  # requests that it runs at once; 0 = not told
    ahead: float = 0.0  # prompt tokens sent there whose first token has not come
    cached: float = 0.0  # tokens of this prompt that are expected in its cache


@dataclass(frozen=True, slots=True)
class RouterChoice:
    """The candidate chosen, what is predicted for it, and why it was."""

    index: int  # into the candidates
    seconds: float  # that it costs, to its end and others; 0 while no pace is known
    candidate: Candidate
    longest: float  # tokens of the prompt that the router with the most of it has cached

    @property
    def reason(self) -> str:
        load = f"{self.candidate.load} requests there"
        if not self.longest:
            return f"nothing cached, {load}"
        if self.candidate.cached == self.longest:
            return f"{self.longest:.0f} tokens cached, {load}"
        return f"{self.longest:.0f} tokens cached elsewhere are not worth the wait, {load}"


def choose(candidates: Sequence[Candidate], pace: Pace, prompt: int, max_tokens: int, draw: int) -> RouterChoice:
    """Of one or more `candidates`, for `prompt` tokens and up to `max_tokens` more; `draw` is random, 0 to 2**32 - 1.

    While no request has been seen to its end there is no pace, and the least loaded is chosen, by prefix where that is
    equal.
    """
    longest = max(candidate.cached for candidate in candidates)
    holders = [i for i, candidate in enumerate(candidates) if candidate.cached == longest] if longest else []
    drawn = _two_of(range(len(candidates)), draw)
    contenders = {*drawn, *_two_of(holders, draw >> 16)}
    output = min(max_tokens, pace.output.value)
    fixed = pace.first_token.intercept + output * pace.gap.intercept
    per_token, per_stream = pace.first_token.slope, output * pace.gap.slope

    def seconds(candidate: Candidate) -> float:
        if not pace.known:
            return 0.0
        load, slots, ahead, cached = candidate
        # Own prefill counts twice. Once only, simulated conversations of 1600 tokens at two thirds load computed 11 % of
        # what was cached again and took 0.85 s each; twice, 0.5 % and 0.60 s.
        tokens = ahead + 2.0 * (prompt - cached)
        streams = min(load + 1, slots or load + 1)
        return fixed + pace.slot_wait(load, slots) + per_token * tokens + per_stream * streams

    predicted = {index: seconds(candidates[index]) for index in contenders}

    def rank(index: int) -> tuple[float, float, float, int]:
        candidate = candidates[index]
        return predicted[index], candidate.load, -candidate.cached, drawn.index(index) if index in drawn else 2

    best = min(contenders, key=rank)
    return RouterChoice(best, predicted[best], candidates[best], longest)


def _two_of(indices: Sequence[int], draw: int) -> tuple[int, ...]:
    """Two different ones of `indices`, or all where there are fewer."""
    if len(indices) <= 2:
        return tuple(indices)[:: -1 if draw & 1 else 1]
    first = draw % len(indices)
    second = (first + 1 + (draw >> 8) % (len(indices) - 1)) % len(indices)
    return indices[first], indices[second]
