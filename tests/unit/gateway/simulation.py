"""Routers and gateways in simulated time: the engines' speed is made up, the gateways' decisions are the real code's."""

from __future__ import annotations

import heapq
import random
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from moiety.gateway.routers.prefixes import PrefixHasher, PrefixIndex, Visit
from moiety.policy.router_choice import Candidate, choose
from moiety.policy.router_pace import Pace

BLOCK = 16
POLL_S = 0.25
PREFILL_TOKENS_PER_S = 2000.0
STEP_S, STEP_PER_STREAM_S = 0.010, 0.002  # a decode step takes STEP_S, and STEP_PER_STREAM_S for each of its streams
CHUNK = 256


@dataclass
class Request:
    """One request: a prompt [n], and how many tokens to generate."""

    arrives: float
    gateway: int
    prompt: np.ndarray
    output: int = 16
    router: int = -1
    cached: int = 0  # tokens found in the router's cache
    hashes: list[int] = field(default_factory=list)
    left: int = 0  # prompt tokens to compute
    made: int = 0
    started: float = 0.0  # when it got a slot
    first: float = 0.0
    streams: int = 0
    pending_prompt_tokens: float = 0.0  # at its router, when it was sent
    queued: bool = False
    guess: float = 0.0
    visit: Visit | None = None


class SimulatedRouter:
    """A continuous-batching engine with chunked prefill and a real LRU cache of blocks."""

    def __init__(self, slots: int, blocks: int):
        self.slots, self.blocks = slots, blocks
        self.cache: OrderedDict[int, None] = OrderedDict()
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()
        self.served = 0
        self.stepping = False

    @property
    def load(self) -> int:
        return len(self.running) + len(self.waiting)

    def step(self, now: float) -> float:
        """Begins the next step; returns the seconds that it takes, 0 when nothing runs."""
        while self.waiting and len(self.running) < self.slots:
            request = self.waiting.popleft()
            request.started, found = now, 0
            while found < len(request.hashes) and request.hashes[found] in self.cache:
                found += 1
            request.cached, request.left = found * BLOCK, len(request.prompt) - found * BLOCK
            self.running.append(request)
        budget, prefill = CHUNK, 0
        for request in self.running:
            part = min(request.left, budget)
            request.left, budget, prefill = request.left - part, budget - part, prefill + part
        streams = sum(request.left == 0 for request in self.running)
        return (STEP_S + streams * STEP_PER_STREAM_S + prefill / PREFILL_TOKENS_PER_S) if self.running else 0.0

    def stepped(self) -> tuple[list[Request], list[Request]]:
        """Ends the step; returns the requests that got their first token, and those that got their last."""
        first, done = [], []
        for request in self.running:
            if request.left == 0:
                request.made += 1
                if request.made == 1:
                    first.append(request)
                    self._keep(request.hashes)
                if request.made == request.output:
                    done.append(request)
        self.running = [request for request in self.running if request.made < request.output]
        self.served += len(done)
        return first, done

    def _keep(self, hashes: Sequence[int]) -> None:
        for block in reversed(hashes):
            self.cache[block] = None
            self.cache.move_to_end(block)
        while len(self.cache) > self.blocks:
            self.cache.popitem(last=False)


class SimulatedGateway:
    """What `gateway.router_peer` and `gateway.attempt` keep, with times passed in."""

    def __init__(self, routers: Sequence[SimulatedRouter], seed: int):
        self.routers, self.pace, self.random = routers, Pace(), random.Random(seed)
        self.hasher = PrefixHasher(1)  # the routers' caches use the same hashes
        self.indices = [PrefixIndex(router.blocks) for router in routers]
        self.in_flight, self.pending_prompt_tokens = [0] * len(routers), [0.0] * len(routers)
        self.others = [0] * len(routers)

    def poll(self) -> None:
        self.others = [max(router.load - mine, 0) for router, mine in zip(self.routers, self.in_flight, strict=True)]

    def send(self, request: Request) -> int:
        request.hashes = self.hasher.hashes(request.prompt, BLOCK, "")
        candidates = [
            Candidate(
                self.others[i] + self.in_flight[i],
                router.slots,
                self.pending_prompt_tokens[i],
                self.pace.found.value * BLOCK * self.indices[i].match(request.hashes),
            )
            for i, router in enumerate(self.routers)
        ]
        draw = self.random.getrandbits(32)
        chosen = request.router = choose(candidates, self.pace, len(request.prompt), request.output, draw).index
        candidate = candidates[chosen]
        request.queued, request.pending_prompt_tokens = (
            candidate.load >= candidate.slots,
            candidate.pending_prompt_tokens,
        )
        request.guess = len(request.prompt) - candidate.cached
        request.visit = self.indices[chosen].visit(request.hashes)
        self.in_flight[chosen] += 1
        self.pending_prompt_tokens[chosen] += request.guess
        return chosen

    def first(self, request: Request, now: float) -> None:
        request.first, request.streams = now, self._streams(request.router)
        self.pending_prompt_tokens[request.router] -= request.guess
        visit = request.visit
        assert visit is not None
        self.indices[request.router].answered(visit, request.cached // BLOCK)
        if visit.expected:
            self.pace = self.pace.looked_up(min(request.cached / (visit.expected * BLOCK), 1.0))
        if not request.queued:
            tokens = request.pending_prompt_tokens + len(request.prompt) - request.cached
            self.pace = self.pace.started(tokens, now - request.arrives)

    def done(self, request: Request, now: float) -> None:
        streams = (request.streams + self._streams(request.router)) / 2
        streaming = now - request.first
        self.pace = self.pace.ended(now - request.started, streams, request.output, streaming)
        self.in_flight[request.router] -= 1

    def _streams(self, router: int) -> int:
        return min(self.others[router] + self.in_flight[router], self.routers[router].slots)


@dataclass
class Outcome:
    """The result of a simulated run."""

    served: list[int]  # requests, by router
    mean_load: list[float]  # over the time in which requests arrived
    requests: list[Request]

    @property
    def imbalance(self) -> float:
        """The busiest router's mean load over the mean of all."""
        return max(self.mean_load) * len(self.mean_load) / sum(self.mean_load)

    @property
    def cached(self) -> int:
        """Prompt tokens that were not computed."""
        return sum(request.cached for request in self.requests)


def simulate(
    requests: Iterable[Request], *, routers: int, gateways: int, seed: int, slots: int = 16, blocks: int = 4096
) -> Outcome:
    """Serves `requests`; the same arguments give the same result."""
    servers = [SimulatedRouter(slots, blocks) for _ in range(routers)]
    fronts = [SimulatedGateway(servers, seed * 1000 + i) for i in range(gateways)]
    arrivals, order = sorted(requests, key=lambda request: request.arrives), count()
    events: list[tuple[float, int, str, int]] = []  # (time, tie breaker, kind, index)
    for index, request in enumerate(arrivals):
        heapq.heappush(events, (request.arrives, next(order), "arrives", index))
    for index in range(gateways):
        heapq.heappush(events, (POLL_S * index / gateways, next(order), "poll", index))
    last, before, area, unserved = arrivals[-1].arrives, 0.0, [0.0] * routers, len(arrivals)

    def begin(router: int, now: float) -> None:
        server = servers[router]
        if not server.stepping and (seconds := server.step(now)):
            server.stepping = True
            heapq.heappush(events, (now + seconds, next(order), "stepped", router))

    while unserved:
        now, _, kind, index = heapq.heappop(events)
        if now <= last:
            area = [so_far + server.load * (now - before) for so_far, server in zip(area, servers, strict=True)]
            before = now
        if kind == "poll":
            fronts[index].poll()
            heapq.heappush(events, (now + POLL_S, next(order), "poll", index))
        elif kind == "arrives":
            request = arrivals[index]
            chosen = fronts[request.gateway].send(request)
            servers[chosen].waiting.append(request)
            begin(chosen, now)
        else:
            servers[index].stepping = False
            first, done = servers[index].stepped()
            for request in first:
                fronts[request.gateway].first(request, now)
            for request in done:
                fronts[request.gateway].done(request, now)
            unserved -= len(done)
            begin(index, now)
    return Outcome([server.served for server in servers], [a / last for a in area], arrivals)
