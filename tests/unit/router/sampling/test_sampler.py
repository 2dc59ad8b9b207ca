"""Sampling: greedy, bounded as in transformers, and a function of each row, its seed, choice and position only."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_support import logits_of, one, sampled, sequence_of
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from moiety.errors import MoietyError
from moiety.router.sampling.sampler import least_shares, sample, uniforms
from moiety.router.sequence.sequence import Sequence

VOCABULARY = 50


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_temperature_is_greedy(dtype: torch.dtype):
    """The largest logit wins, the first among equals, for any seed, top-k and top-p."""
    logits = logits_of(1, dtype=dtype)
    for seed in range(5):
        assert one(logits, sequence_of(temperature=0.0, seed=seed, top_k=3, top_p=0.5)).token == int(logits.argmax())
    assert one(torch.tensor([[1.0, 3.0, 3.0]]), sequence_of(temperature=0.0)).token == 1


def theirs(logits: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """Returns transformers' probabilities [n, V] after its own warpers, in the sampler's order."""
    warpers: list[Any] = []
    if (temperature := options.get("temperature", 1.0)) != 1.0:
        warpers.append(TemperatureLogitsWarper(temperature))
    if min_p := options.get("min_p"):
        warpers.append(MinPLogitsWarper(min_p))
    if top_k := options.get("top_k"):
        warpers.append(TopKLogitsWarper(top_k))
    if (top_p := options.get("top_p", 1.0)) < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    for warper in warpers:
        logits = warper(None, logits)
    return logits.softmax(-1)


def ours(logits: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """Returns the probabilities that the sampler draws from."""
    sequences = [sequence_of(**options) for _ in logits]
    shares = (logits / options.get("temperature", 1.0)).softmax(-1)
    least = least_shares(shares, sequences)
    kept = shares if least is None else shares * (shares >= least)
    return kept / kept.sum(-1, keepdim=True)


BOUNDS: list[dict[str, Any]] = [
    {"temperature": 0.6},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 1},
    {"top_k": 40},
    {"top_p": 0.9},
    {"top_p": 0.001},
    {"top_p": 0.999},
    {"top_k": 40, "top_p": 0.8, "temperature": 2.0},
    {"min_p": 0.02, "top_k": 30, "top_p": 0.95, "temperature": 0.7},
    {"min_p": 0.02, "top_p": 0.95, "temperature": 1.3},
]


@pytest.mark.parametrize("options", BOUNDS, ids=str)
@pytest.mark.parametrize("vocabulary", [320, 4096])
def test_bounds_are_transformers_bounds(options: dict[str, Any], vocabulary: int):
    """The sampler keeps the same tokens, with the same probabilities, as transformers' processors in the same order."""
    logits = logits_of(2, vocabulary, rows=24)
    expected, found = theirs(logits, options), ours(logits, options)
    assert torch.equal(expected > 0, found > 0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, *BOUNDS[4:6], *BOUNDS[8:10]], ids=str)
def test_draws_follow_transformers_distribution(options: dict[str, Any]):
    """Over 8,192 positions Pearson's statistic stays in the range of chance, and no token outside the bounds is drawn."""
    logits, draws = logits_of(3, VOCABULARY), 8192
    rows = [sequence_of(generated=[5] * (at % 64), seed=at // 64, **options) for at in range(draws)]
    drawn = Counter(result.token for result in sampled(logits.expand(draws, -1), *rows))
    probabilities = theirs(logits, options)[0].double()
    assert all(probabilities[token] > 0 for token in drawn)
    common = [token for token in range(VOCABULARY) if probabilities[token] * draws >= 5]
    statistic = sum(
        (drawn[token] - draws * float(probabilities[token])) ** 2 / (draws * float(probabilities[token]))
        for token in common
    )
    freedom = max(len(common) - 1, 1)
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5, "five deviations of the chi-square distribution"


def test_every_token_can_be_drawn_where_its_share_lies():
    """The ends of the range draw the first and last token, also in a vocabulary of partial blocks."""
    weights = torch.zeros(1, 131)
    weights[0, [0, 63, 64, 130]] = 8.0
    logits = weights - 1000 * (weights == 0)
    drawn = Counter(result.token for seed in range(300) for result in sampled(logits, sequence_of(seed=seed)))
    assert set(drawn) == {0, 63, 64, 130}
    assert min(drawn.values()) > 40


PARAMETERS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 1.7]),
        "top_k": st.sampled_from([0, 0, 1, 7, 300]),
        "top_p": st.sampled_from([1.0, 1.0, 0.1, 0.9]),
        "min_p": st.sampled_from([0.0, 0.0, 0.05]),
        "repetition_penalty": st.sampled_from([1.0, 1.0, 1.3]),
        "presence_penalty": st.sampled_from([0.0, 0.7]),
        "frequency_penalty": st.sampled_from([0.0, -0.4]),
        "logit_bias": st.sampled_from([{}, {}, {5: 3.0, 17: -100.0}]),
        "min_tokens": st.sampled_from([0, 5]),
        "logprobs": st.just(True),
        "top_logprobs": st.sampled_from([0, 3, 20]),
        "seed": st.integers(0, 2**64 - 1),
        "choice": st.integers(0, 15),
        "generated": st.lists(st.integers(0, 319), max_size=9),
    }
)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(PARAMETERS, min_size=2, max_size=9),
    vocabulary=st.sampled_from([320, 331, 1024]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 10**6),
)
def test_no_bit_of_a_row_depends_on_the_others(
    rows: list[dict[str, Any]], vocabulary: int, dtype: torch.dtype, seed: int
):
    """Tokens and log probabilities of a mixed batch are, to the bit, those of each row by itself."""
    logits = logits_of(seed, vocabulary, rows=len(rows), dtype=dtype)
    before = logits.clone()
    together = sampled(logits, *(sequence_of(**row) for row in rows))
    alone = [one(logits[at : at + 1], sequence_of(**row)) for at, row in enumerate(rows)]
    assert together == alone
    assert torch.equal(logits, before), "the engine's logits are not the sampler's to change"


def test_a_seed_gives_the_same_tokens_whatever_else_runs():
    """The result depends on seed, choice and position only, not on call order, global generators or other samples."""

    def at(position: int, seed: int = 7, choice: int = 0) -> int:
        return one(logits_of(position), sequence_of(generated=[5] * position, seed=seed, choice=choice)).token

    first = [at(position) for position in range(20)]
    torch.manual_seed(123)
    again = {}
    for position in reversed(range(20)):
        torch.rand(3)
        at(99, seed=8)
        again[position] = at(position)
    assert [again[position] for position in range(20)] == first
    assert first != [at(position, seed=8) for position in range(20)]
    assert first != [at(position, choice=1) for position in range(20)]


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-38, 1e-45])
def test_a_tiny_temperature_is_as_good_as_greedy(temperature: float):
    """Logits divided by a tiny temperature do not overflow."""
    logits = logits_of(5)
    assert one(logits, sequence_of(temperature=temperature, seed=3)).token == int(logits.argmax())


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_log_probabilities_are_of_the_model(temperature: float):
    """They are the model's own, before temperature, bounds and penalties, likeliest first, and sent only on request."""
    logits, options = logits_of(6), {"temperature": temperature, "top_k": 4, "logit_bias": {7: 50.0}}
    result = one(logits, sequence_of(logprobs=True, top_logprobs=3, **options))
    expected = logits.log_softmax(-1)[0]
    assert result.token == 7
    assert result.logprob == pytest.approx(float(expected[7]))
    assert result.top is not None
    assert result.top.token_ids == tuple(expected.topk(3).indices.tolist())
    assert result.top.logprobs == pytest.approx(expected.topk(3).values.tolist())
    silent = one(logits, sequence_of(**options))
    assert (silent.token, silent.logprob, silent.top) == (7, None, None)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_cannot_be_sampled_ends_alone(temperature: float, broken: float):
    """Logits that are not finite end only their own request; other rows get the result of running alone."""
    logits = logits_of(8, rows=3)
    logits[1] = broken
    rows = [sequence_of(temperature=temperature, seed=seed, top_p=0.9, logprobs=True) for seed in range(3)]
    first, failed, last = sample(logits, rows)
    assert isinstance(failed, MoietyError)
    assert "not finite" in str(failed)
    assert [first, last] == [one(logits[row : row + 1], rows[row]) for row in (0, 2)]


def test_a_bug_in_one_row_ends_that_row_alone():
    """If the batch raises, each row is sampled alone, and only the failing row gives an error."""
    logits = logits_of(9, rows=3)
    rows: list[Sequence] = [sequence_of(seed=seed) for seed in range(3)]
    rows[1] = sequence_of(logit_bias={10**6: 1.0})  # the service would refuse it
    first, failed, last = sample(logits, rows)
    assert isinstance(failed, MoietyError)
    assert str(failed) == "sampling failed; the router's log says why"
    assert [first, last] == [one(logits[row : row + 1], copy.copy(rows[row])) for row in (0, 2)]


def test_noise_is_philox_and_uniform():
    """The noise is numpy's Philox at (position, choice) with the seed as key: in [0, 1), with the expected mean."""
    for seed, choice, position in [(0, 0, 0), (1, 2, 3), (2**64 - 1, 15, 2**40)]:
        reference = np.random.Generator(np.random.Philox(key=seed, counter=[position, choice, 0, 0]))
        assert uniforms([(seed, choice, position)])[0] == reference.random()
    values = uniforms([(5, 0, position) for position in range(2000)])
    assert ((values >= 0) & (values < 1)).all()
    assert values.mean() == pytest.approx(0.5, abs=0.03)
