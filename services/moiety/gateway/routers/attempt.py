"""One request at one router: counts its prompt at that router, and measures how fast the routers are."""

from __future__ import annotations

import time

from moiety.gateway.routers.prompt import Prompt
from moiety.gateway.routers.router_peer import RouterPeer
from moiety.internal.v1 import engine_pb2
from moiety.policy.router_pace import Pace


class Attempt:
    """One request at one router, from its construction until `end`.

    `pace`, how fast the routers are (policy/router_pace.py), is a frozen value: each method takes it and returns the new one.
    """

    def __init__(self, router: RouterPeer, prompt: Prompt, pace: Pace):
        self._router, self._prompt = router, prompt
        self._queued = router.load >= router.slots > 0
        self._ahead = router.pending_prompt_tokens
        self._hashes = router.hashes(prompt)
        self._visit = router.prefixes.visit(self._hashes) if router.prefixes is not None else None
        matched = self._visit.matched * router.block_tokens if self._visit is not None else 0
        self._to_compute = prompt.tokens - pace.found.value * matched
        self._generated: list[int] = []
        self._streams = 0.0
        self._sent = self._first = self._last = time.monotonic()
        router.pending_prompt_tokens += self._to_compute
        self._answered = False

    def event(self, event: engine_pb2.EngineEvent, pace: Pace) -> Pace:
        """Records an event of the request; returns `pace`, which the first event updates."""
        self._last = time.monotonic()
        self._generated.extend(event.token_ids)
        return pace if self._answered else self._answer(event.cached_tokens, pace)

    def end(self, pace: Pace) -> Pace:
        """Records that the request has left the router, for whatever reason.

        Returns `pace`. It is updated only if an event has arrived and the request has a single sequence.
        """
        router, prompt = self._router, self._prompt
        if not self._answered:
            router.pending_prompt_tokens -= self._to_compute
            if router.prefixes is not None and self._visit is not None:
                router.prefixes.withdraw(self._visit, self._hashes)
            return pace
        if prompt.sequences > 1:  # its sequences share the stream, so no single one can be timed
            return pace
        if router.prefixes is not None:
            hashes = prompt.hashes_with(self._generated, router.block_tokens)
            router.prefixes.visit(hashes).computed = True
        prefill, streaming = pace.first_token.at(self._to_compute), self._last - self._first
        streams = (self._streams + self._running + 1) / 2  # + 1: our own, which has just ended
        return pace.ended(min(self._first - self._sent, prefill) + streaming, streams, len(self._generated), streaming)

    def _answer(self, cached_tokens: int, pace: Pace) -> Pace:
        """Records the first event: the prompt is computed, and `cached_tokens` of it were cached. Returns the new `pace`."""
        router, visit = self._router, self._visit
        self._answered, self._first, self._streams = True, self._last, self._running
        router.pending_prompt_tokens -= self._to_compute
        if router.prefixes is not None and visit is not None:
            router.prefixes.answered(visit, cached_tokens // router.block_tokens)
            if visit.expected:
                pace = pace.looked_up(min(cached_tokens / (visit.expected * router.block_tokens), 1.0))
        if self._queued:
            return pace
        self._to_compute = self._prompt.tokens - cached_tokens
        return pace.started(self._ahead + self._to_compute, self._first - self._sent)

    @property
    def _running(self) -> float:
        """Sequences that the router runs at the same time now: its load, but at most its slots."""
        slots = self._router.slots
        return min(self._router.load, slots) if slots else self._router.load
