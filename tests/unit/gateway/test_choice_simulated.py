"""Many requests, gateways and routers in simulated time: load stays balanced, and prompts go to routers that cache them."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation import BLOCK, Request, simulate

ROUTERS, SLOTS = 4, 16
RATE = 25.0  # requests a second: some two thirds of what four routers can do
few = settings(max_examples=8, derandomize=True, deadline=None)
seeds, gateways = st.integers(0, 1000), st.integers(1, 4)


def arrivals(drawn: random.Random, requests: int = 300) -> Iterator[float]:
    """Yields the times of a Poisson process."""
    now = 0.0
    for _ in range(requests):
        now += drawn.expovariate(RATE)
        yield now


def ids(drawn: random.Random, tokens: int) -> np.ndarray:
    """Returns a random prompt."""
    return np.frombuffer(drawn.randbytes(4 * tokens), dtype=np.uint32) % 50_000


@few
@given(seed=seeds, gateways=gateways)
def test_without_shared_prefixes_load_is_balanced(seed: int, gateways: int):
    """With 1 to 4 gateways and reports 0.25 s old, no router gets over 15 % more requests or 25 % more load than the mean."""
    drawn = random.Random(seed)
    requests = [Request(at, drawn.randrange(gateways), ids(drawn, 128)) for at in arrivals(drawn)]
    outcome = simulate(requests, routers=ROUTERS, gateways=gateways, seed=seed)
    assert max(outcome.served) <= 1.15 * len(requests) / ROUTERS
    assert outcome.imbalance <= 1.25


@few
@given(seed=seeds, gateways=gateways)
def test_sessions_return_to_their_prefixes(seed: int, gateways: int):
    """Conversations find at least 90 % of the prefix tokens that could be cached from their earlier turns."""
    drawn = random.Random(seed)
    requests, ideal = [], 0
    for session in range(40):
        at, prompt = drawn.uniform(0.0, 15.0), ids(drawn, 400)
        for turn in range(6):
            requests.append(Request(at, session % gateways, prompt))
            ideal += (len(prompt) - 65) // BLOCK * BLOCK if turn else 0
            prompt, at = np.concatenate((prompt, ids(drawn, 64))), at + drawn.uniform(2.0, 4.0)
    outcome = simulate(requests, routers=ROUTERS, gateways=gateways, seed=seed)
    assert outcome.cached >= 0.9 * ideal


@few
@given(seed=seeds, gateways=gateways)
def test_a_hot_prefix_does_not_overload_one_router(seed: int, gateways: int):
    """A tenth at most of a prefix that every request has is computed again, and no router is asked for more than its slots.

    Loads may differ: a gateway stays with the routers that it knows to have the prefix, until waiting there costs more.
    """
    drawn = random.Random(seed)
    hot = ids(drawn, 1024)
    requests = [Request(at, drawn.randrange(gateways), np.concatenate((hot, ids(drawn, 32)))) for at in arrivals(drawn)]
    outcome = simulate(requests, routers=ROUTERS, gateways=gateways, seed=seed, slots=SLOTS)
    assert max(outcome.mean_load) <= SLOTS
    assert outcome.cached >= 0.9 * 1024 * len(requests)


@pytest.mark.parametrize("blocks", [64, 4096], ids=["a cache for two conversations", "for all"])
def test_evictions_do_not_unbalance_the_load(blocks: int):
    """Where routers evict prompts, the gateways' estimates follow, and the load stays balanced."""
    drawn = random.Random(5)
    prompts = [ids(drawn, 400) for _ in range(60)]
    requests = [Request(at, drawn.randrange(2), prompts[drawn.randrange(60)]) for at in arrivals(drawn)]
    assert simulate(requests, routers=ROUTERS, gateways=2, seed=5, blocks=blocks).imbalance <= 1.4


def test_the_same_seed_makes_the_same_choices():
    """Two runs with the same seed send each request to the same router."""

    def chosen() -> list[int]:
        drawn = random.Random(1)
        requests = [Request(at, drawn.randrange(2), ids(drawn, 64)) for at in arrivals(drawn, 100)]
        return [request.router for request in simulate(requests, routers=3, gateways=2, seed=9).requests]

    assert chosen() == chosen()
