"""Sampling: greedy, bounded by top-k and top-p as a naive twin bounds it, and a function of seed and position alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moiety.core import Sampling
from moiety.router.sampler import sample, uniform

VOCABULARY = 50


def logits_of(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random logits of a small vocabulary."""
    return (3 * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed))).to(dtype)


def sampling(**changes: Any) -> Sampling:
    """Temperature 1 unless told otherwise."""
    return Sampling(**{"max_tokens": 8, "temperature": 1.0, **changes})


def allowed(logits: torch.Tensor, options: Sampling) -> dict[int, float]:
    """The naive twin: token -> probability after temperature, top-k and top-p, with plain Python sums."""
    scores = (logits.double() / options.temperature).tolist()
    ranked = sorted(range(len(scores)), key=lambda token: -scores[token])
    if options.top_k:
        ranked = ranked[: options.top_k]
    top = scores[ranked[0]]
    weights = [2.718281828459045 ** (scores[token] - top) for token in ranked]
    kept, total = [], 0.0
    for token, weight in zip(ranked, weights, strict=True):
        if total >= options.top_p * sum(weights):
            break
        kept.append((token, weight))
        total += weight
    return {token: weight / total for token, weight in kept}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_temperature_is_greedy(dtype: torch.dtype):
    """The largest logit, whatever the seed, top-k and top-p say; of equals the first."""
    logits = logits_of(1, dtype)
    for seed in range(5):
        token, _ = sample(logits, sampling(temperature=0.0, seed=seed, top_k=3, top_p=0.5), seed)
        assert token == int(logits.argmax())
    assert sample(torch.tensor([1.0, 3.0, 3.0]), sampling(temperature=0.0), 0)[0] == 1


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 10**6),
    temperature=st.floats(0.05, 10.0),
    top_k=st.integers(0, VOCABULARY),
    top_p=st.floats(0.01, 1.0),
)
def test_only_tokens_within_the_bounds_are_drawn(
    seed: int, position: int, temperature: float, top_k: int, top_p: float
):
    """The token is one the naive twin allows; one whose share is within rounding of the bound may go either way."""
    logits, options = logits_of(position), sampling(seed=seed, temperature=temperature, top_k=top_k, top_p=top_p)
    token, _ = sample(logits, options, position)
    slack = sampling(temperature=temperature, top_k=top_k, top_p=min(1.0, top_p + 1e-5))
    assert token in allowed(logits, slack)


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 10, "top_p": 0.8, "temperature": 2.0}],
    ids=str,
)
def test_draws_follow_the_naive_twins_distribution(options: dict[str, Any]):
    """Over 4,000 positions each token comes as often as its probability says (within five standard deviations)."""
    logits, draws = logits_of(3), 4000
    drawn = Counter(sample(logits, sampling(seed=11, **options), position)[0] for position in range(draws))
    twin = allowed(logits, sampling(**options))
    assert set(drawn) <= set(twin)
    for token, probability in twin.items():
        deviation = (draws * probability * (1 - probability)) ** 0.5
        assert abs(drawn[token] - draws * probability) <= 5 * deviation + 1


def test_a_seed_gives_the_same_tokens_whatever_else_runs():
    """Seed and position decide: not the order of calls, not global generators, not what was sampled in between."""
    options = sampling(seed=7)
    first = [sample(logits_of(p), options, p)[0] for p in range(20)]
    torch.manual_seed(123)
    again = {}
    for position in reversed(range(20)):
        torch.rand(3)
        sample(logits_of(99), sampling(seed=8), position)
        again[position] = sample(logits_of(position), options, position)[0]
    assert [again[position] for position in range(20)] == first
    assert first != [sample(logits_of(p), sampling(seed=8), p)[0] for p in range(20)]


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-38, 1e-45])
def test_a_tiny_temperature_is_as_good_as_greedy(temperature: float):
    """Logits divided by almost nothing must not overflow into nonsense."""
    logits = logits_of(5)
    assert sample(logits, sampling(temperature=temperature, seed=3), 0)[0] == int(logits.argmax())


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_log_probabilities_are_of_the_model(temperature: float):
    """The log probability is the model's own, before temperature and bounds; 0 unless asked for."""
    logits = logits_of(6)
    options = sampling(temperature=temperature, top_k=4, logprobs=True)
    token, logprob = sample(logits, options, 2)
    assert logprob == pytest.approx(float(logits.log_softmax(-1)[token]))
    assert sample(logits, sampling(temperature=temperature, top_k=4), 2) == (token, 0.0)


def test_uniform_is_uniform_and_reproducible():
    """Philox: the same on every machine and version, in [0, 1), with the mean where it belongs."""
    assert uniform(1, 2) == uniform(1, 2)
    values = [uniform(5, position) for position in range(2000)]
    assert all(0 <= value < 1 for value in values)
    assert sum(values) / len(values) == pytest.approx(0.5, abs=0.03)
    assert 0 <= uniform(2**64 - 1, 2**40) < 1
