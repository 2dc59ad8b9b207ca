"""Decides which router a request goes to: a pure function of what is known of each router and of a random number.

A request goes to the router where it costs the least time: the wait for a slot, the prefill of its uncached tokens behind
the prefill already queued there, and decoding, which is slower the more requests stream at once. Its own prefill counts
twice, because it also delays the requests behind it. So a cached prefix wins until the wait at its router costs more than
computing it again.

Only a few routers are compared: two drawn at random, and two of those with the longest prefix. Load is known as of the last
poll, and if every gateway chose the best of all routers, all would choose the same one until the next poll (Mitzenmacher,
"How Useful Is Old Information?", 2000). Two random choices keep the balance without this herding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from moiety.policy.router_pace import Pace


class Candidate(NamedTuple):
    """One router, as one gateway sees it at the moment of the choice."""

    load: int  # requests there, running or waiting
    slots: int  # requests that it runs at once; 0 = unknown
    pending_prompt_tokens: float = 0.0  # prompt tokens of requests sent there that have no first token yet
    cached: float = 0.0  # tokens of this prompt that are expected in its cache


@dataclass(frozen=True, slots=True)
class RouterChoice:
    """The chosen candidate, its predicted cost and the reason."""

    index: int  # into the candidates
    seconds: float  # predicted cost, the delay of later requests included; 0 while no pace is known
    candidate: Candidate
    longest: float  # most tokens of the prompt that any router has cached

    @property
    def reason(self) -> str:
        load = f"{self.candidate.load} requests there"
        if not self.longest:
            return f"nothing cached, {load}"
        if self.candidate.cached == self.longest:
            return f"{self.longest:.0f} tokens cached, {load}"
        return f"{self.longest:.0f} tokens cached elsewhere are not worth the wait, {load}"


def choose(candidates: Sequence[Candidate], pace: Pace, prompt: int, max_tokens: int, draw: int) -> RouterChoice:
    """Chooses one of `candidates` for `prompt` tokens and up to `max_tokens` more; `draw` is random, 0 to 2**32 - 1.

    Until a first request has finished, `pace` is unknown. The choice is then the least loaded of the compared routers, or
    on a tie the one with the longest cached prefix.
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
        load, slots, pending_prompt_tokens, cached = candidate
        # The request's own prefill counts twice. In simulated conversations of 1600 tokens at two thirds load, counting it
        # once recomputed 11 % of what was cached and took 0.85 s each; counting it twice, 0.5 % and 0.60 s.
        tokens = pending_prompt_tokens + 2.0 * (prompt - cached)
        streams = min(load + 1, slots or load + 1)
        return fixed + pace.slot_wait(load, slots) + per_token * tokens + per_stream * streams

    predicted = {index: seconds(candidates[index]) for index in contenders}

    def rank(index: int) -> tuple[float, float, float, int]:
        candidate = candidates[index]
        return predicted[index], candidate.load, -candidate.cached, drawn.index(index) if index in drawn else 2

    best = min(contenders, key=rank)
    return RouterChoice(best, predicted[best], candidates[best], longest)


def _two_of(indices: Sequence[int], draw: int) -> tuple[int, ...]:
    """Returns two different elements of `indices`, or all if there are fewer."""
    if len(indices) <= 2:
        return tuple(indices)[:: -1 if draw & 1 else 1]
    first = draw % len(indices)
    second = (first + 1 + (draw >> 8) % (len(indices) - 1)) % len(indices)
    return indices[first], indices[second]
