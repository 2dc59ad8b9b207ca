"""Little memory, many requests, shared prompts: each stream gets the tokens of running alone, and no block is lost."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from engine_support import (
    BLOCK_TOKENS,
    RememberingModel,
    engine_of,
    expected_logits,
    expected_tokens,
    finish,
    greedy,
    prompt_of,
    submit,
)

from moiety.core.sampling import FinishReason, Sampling
from moiety.errors import Cancelled, HopFailed, InvalidRequest, MoietyError, NoHolder, ResourceExhausted

CHOICES = Sampling(max_tokens=8, temperature=1.0, seed=3, n=3, ignore_eos=True)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("revision", ["r", None], ids=["with prefixes", "without"])
def test_preempted_streams_neither_repeat_nor_lose_a_token(revision: str | None, window: int | None):
    """Eight requests with blocks for hardly one get the tokens of running alone, with and without a window."""
    model = RememberingModel(window)
    engine = engine_of(model, slots=4, token_budget=8, blocks=9, revision=revision, window=window)
    prompts = [prompt_of(seed, 5 + seed) for seed in range(8)]
    listeners = [submit(engine, prompt, sampling=greedy(20))[1] for prompt in prompts]
    finish(engine)
    assert [listener.tokens for listener in listeners] == [expected_tokens(prompt, 20, window) for prompt in prompts]
    if window is None:
        computed = sum(map(len, model.steps))
        assert computed > sum(len(prompt) + 19 for prompt in prompts), (
            "no sequence was preempted: the test tests nothing"
        )


def test_a_shared_beginning_is_computed_once():
    """The second of two prompts with a common beginning computes only the rest, and reports its cached tokens."""
    model = RememberingModel()
    engine = engine_of(model)
    common = prompt_of(1, 9)
    _, first = submit(engine, [*common, 1, 2], sampling=greedy(3))
    finish(engine)
    model.steps.clear()
    _, second = submit(engine, [*common, 3, 4], sampling=greedy(3))
    _, other_tenant = submit(engine, [*common, 3, 4], sampling=greedy(3), tenant="other")
    finish(engine)
    assert model.steps[0] == [common[8], 3, 4, *common[:7]], "8 tokens are in two full blocks of this tenant"
    assert second.tokens == other_tenant.tokens == expected_tokens([*common, 3, 4], 3)
    assert first.tokens == expected_tokens([*common, 1, 2], 3)
    _, both = submit(engine, [*common, 3, 4], sampling=replace(CHOICES, n=2))
    finish(engine)
    assert both.cached_tokens == {0: 8, 1: 8}, "each choice reports its cached tokens"
    assert [listener.cached_tokens[0] for listener in (first, second, other_tenant)] == [0, 8, 0]


def test_a_fully_cached_prompt_still_computes_its_last_token():
    """The last prompt token is always computed for its logits; prompt log probabilities use no cached prefix."""
    model = RememberingModel()
    engine = engine_of(model, token_budget=20)
    prompt = prompt_of(2, 8)
    for sampling, computed, cached in [
        (greedy(1), prompt, 0),
        (greedy(1), prompt[4:], 4),
        (greedy(1, prompt_logprobs=True), prompt, 0),
    ]:
        model.steps.clear()
        _, listener = submit(engine, prompt, sampling=sampling)
        finish(engine)
        assert model.steps == [computed]
        assert listener.tokens == expected_tokens(prompt, 1)
        assert listener.cached_tokens == {0: cached}


def test_prompt_log_probabilities_are_complete_and_sent_once():
    """They are complete and sent once, also for a prompt that is chunked, preempted and has several choices."""
    engine = engine_of(RememberingModel(), slots=2, token_budget=6, blocks=8)
    prompt = prompt_of(3, 20)
    _, scored = submit(engine, prompt, sampling=replace(CHOICES, n=2, prompt_logprobs=True))
    for _ in range(2):
        engine.step()
    _, urgent = submit(engine, [1], sampling=greedy(3), priority=-1)
    engine.step()
    assert engine.load.waiting == 1
    finish(engine)
    expected = [
        float(expected_logits(prompt[: at + 1]).log_softmax(-1)[prompt[at + 1]]) for at in range(len(prompt) - 1)
    ]
    assert scored.prompt_logprobs == pytest.approx(expected)
    assert scored.choices == {choice: alone(prompt, choice, CHOICES) for choice in range(2)}
    assert urgent.tokens == expected_tokens([1], 3)


# Choices ---------------------------------------------------------------------------------------------------------


def alone(prompt: list[int], choice: int, sampling: Sampling) -> list[int]:
    """Returns the tokens that a request for this choice gets from its own engine."""
    engine = engine_of(RememberingModel())
    _, listener = submit(engine, prompt, sampling=replace(sampling, n=1), choice=choice)
    finish(engine)
    return listener.choices[choice]


@pytest.mark.parametrize("length", [7, 8, 21], ids=["partial block", "full blocks", "several chunks"])
@pytest.mark.parametrize("blocks", [25, 8], ids=["roomy", "hardly one"])
def test_choices_share_the_prompt_and_nothing_else(length: int, blocks: int):
    """The prompt is computed once, each choice gets the tokens of running alone, and each has its own end."""
    model = RememberingModel()
    engine = engine_of(model, blocks=blocks)
    prompt = prompt_of(length, length)
    _, listener = submit(engine, prompt, sampling=CHOICES)
    _, other = submit(engine, [5, 6], sampling=greedy(8))
    finish(engine)
    assert listener.choices == {choice: alone(prompt, choice, CHOICES) for choice in range(3)}
    assert len(set(map(tuple, listener.choices.values()))) == 3
    assert [listener.ends[choice].finish for choice in range(3)] == [FinishReason.LENGTH] * 3
    assert listener.cached_tokens == {0: 0, 1: 0, 2: 0}, "tokens computed here do not count as cached"
    assert other.tokens == expected_tokens([5, 6], 8)
    if blocks == 25:
        assert sum(map(len, model.steps)) == length + 3 * 7 + 2 + 7, "each token once"


def test_choices_need_a_slot_each():
    """Slots for all choices are reserved at admission; a request for more choices than slots is refused."""
    model = RememberingModel()
    engine = engine_of(model, slots=4)
    with pytest.raises(InvalidRequest, match=r"sampling.n = 5: must be at most 4"):
        submit(engine, [1], sampling=replace(CHOICES, n=5))
    submit(engine, prompt_of(1, 20), sampling=CHOICES)
    _, fits = submit(engine, [5], sampling=greedy(2))
    _, waits = submit(engine, [6], sampling=greedy(2))
    engine.step()
    assert (engine.load.running, engine.load.waiting) == (2, 1)
    finish(engine)
    assert (fits.tokens, waits.tokens) == (expected_tokens([5], 2), expected_tokens([6], 2))


@pytest.mark.parametrize("steps", [0, 1, 4], ids=["waiting", "prefilling", "decoding"])
def test_cancelling_a_request_ends_all_its_choices(steps: int):
    """Cancelling works in any phase, frees the blocks at the next step, and does not affect other requests."""
    engine = engine_of(RememberingModel())
    sequence, listener = submit(engine, prompt_of(1, 20), sampling=CHOICES)
    for _ in range(steps):
        engine.step()
    engine.cancel(sequence)
    _, other = submit(engine, [5], sampling=greedy(8))
    engine.step()
    assert [type(end.error) for _, end in sorted(listener.ends.items())] == [Cancelled] * 3
    assert engine.load.running == 1
    engine.check_integrity()
    finish(engine)
    assert other.tokens == expected_tokens([5], 8)


# Overload and memory ---------------------------------------------------------------------------------------------


def test_requests_beyond_the_queue_get_a_retry_delay():
    """Requests beyond the queue get ResourceExhausted with a delay from the observed rate; accepted ones finish."""
    engine = engine_of(RememberingModel(), slots=2, queue_limit=4)
    accepted, hints = [], []
    for number in range(200):
        try:
            prompt = [number % 32, 3]
            accepted.append((prompt, submit(engine, prompt, sampling=greedy(4))[1]))
        except ResourceExhausted as error:
            hints.append(error.retry_after_s)
            engine.step()
    finish(engine)
    assert len(accepted) + len(hints) == 200
    assert len(accepted) > 50
    assert all(listener.tokens == expected_tokens(prompt, 4) for prompt, listener in accepted)
    assert hints[0] == 1.0, "no admission was observed yet"
    assert 0.05 <= hints[-1] < 1.0


def test_a_higher_priority_does_not_wait_for_a_free_slot():
    """It takes a slot at the next step; the preempted request continues later with the same tokens."""
    engine = engine_of(RememberingModel(), slots=2)
    low = [submit(engine, prompt_of(seed, 5), sampling=greedy(20), priority=10)[1] for seed in range(2)]
    for _ in range(5):
        engine.step()
    _, urgent = submit(engine, [3], sampling=greedy(4), priority=-10)
    for _ in range(4):
        engine.step()
    assert urgent.tokens == expected_tokens([3], 4)
    finish(engine)
    assert [listener.tokens for listener in low] == [expected_tokens(prompt_of(seed, 5), 20) for seed in range(2)]


@pytest.mark.parametrize(
    "seed", [0, 1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_soak(seed: int, request: pytest.FixtureRequest):
    """With random arrivals, priorities, tenants, choices, cancellations and failures, each output is as if run alone.

    The slow seeds run twenty times as long, to find leaks that need rare coincidences.
    """
    chance = random.Random(seed)
    rounds = 4000 if request.node.get_closest_marker("slow") else 200
    model = RememberingModel()
    engine = engine_of(model, slots=4, token_budget=9, blocks=12)

    def lose(ids: list[int]) -> None:
        if chance.random() < 0.01:
            raise HopFailed([chance.randrange(len(ids))], NoHolder(0, [3], 30.0))

    model.before = lose
    shared = prompt_of(99, 12)
    requests = []
    for _ in range(rounds):
        if chance.random() < 0.25:
            prompt = shared[: chance.randrange(13)] + prompt_of(chance.randrange(10), chance.randint(1, 12))
            sampling = replace(
                greedy(chance.randint(1, 20)),
                n=chance.choice([1, 1, 1, 2, 4]),
                temperature=chance.choice([0.0, 1.0]),
                seed=chance.randrange(5),
                prompt_logprobs=chance.random() < 0.1,
            )
            options = {"priority": chance.choice([0, 0, 1]), "tenant": chance.choice("ab")}
            requests.append((prompt, sampling, *submit(engine, prompt, sampling=sampling, **options)))
        if requests and chance.random() < 0.03:
            engine.cancel(chance.choice(requests)[2])
        engine.step()
        engine.check_integrity()
    finish(engine, 20_000)
    done = 0
    expected: dict[tuple[object, ...], list[int]] = {}
    for prompt, sampling, _, listener in requests:
        assert sorted(listener.ends) == list(range(sampling.n))
        for choice, end in listener.ends.items():
            key = (*prompt, choice, sampling.seed, sampling.temperature)
            if len(expected.get(key, ())) < sampling.max_tokens:
                expected[key] = alone(prompt, choice, sampling)
            got = listener.choices[choice]
            assert got == expected[key][: len(got)]
            assert isinstance(end.error, MoietyError) or len(got) == sampling.max_tokens
            done += end.error is None
    assert done > rounds / 10


def test_a_request_that_can_never_fit_is_refused_and_the_largest_that_can_is_served():
    """The bound of the KV cache is exact to the block."""
    engine = engine_of(RememberingModel(), blocks=5, slots=4)
    prompt = prompt_of(1, 12)
    with pytest.raises(InvalidRequest, match=r"prompt \+ max_tokens = 21: must be at most 20"):
        submit(engine, prompt, sampling=greedy(9))
    _, largest = submit(engine, prompt, sampling=greedy(5 * BLOCK_TOKENS - 12))
    small = [submit(engine, [seed], sampling=greedy(15))[1] for seed in range(3)]
    finish(engine)
    assert largest.tokens == expected_tokens(prompt, 8)
    assert [listener.tokens for listener in small] == [expected_tokens([seed], 15) for seed in range(3)]
