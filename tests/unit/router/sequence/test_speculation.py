"""Drafts change only the number of steps of an engine: no token, no block and no order of waiting."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from engine_support import STOP, VOCABULARY, CountingModel, Listener, RememberingModel, engine_of, finish, submit

from moiety.core.sampling import FinishReason, Sampling

ROUND = [*range(VOCABULARY), 0, 1, 2]  # a CountingModel repeats it
FEW_WORDS = dict.fromkeys(range(3, VOCABULARY), -100.0)  # so that some drafts are right
REQUESTS = [
    (
        seed,
        Sampling(
            max_tokens=30,
            stop_token_ids=(2,) if seed == 5 else (),
            min_tokens=9 if seed == 5 else 0,
            logprobs=seed % 3 == 0,
            logit_bias=FEW_WORDS,
            temperature=temperature,
            seed=seed,
        ),
    )
    for seed, temperature in enumerate((0.0, 0.7, 0.0, 0.2, 0.0, 1.0, 0.0, 0.0))
]


def prompt_of(seed: int) -> list[int]:
    """Returns a prompt of few distinct tokens, often repeated; all prompts share the first block."""
    return [1, 2, 1, 2, *random.Random(seed).choices(range(3), k=6 + seed)]


def answers(speculative_tokens: int, blocks: int) -> tuple[list[Listener], RememberingModel]:
    """Runs all requests together, then again with cached prefixes; returns their listeners and the model."""
    model = RememberingModel(window=2)
    engine = engine_of(model, token_budget=24, blocks=blocks, speculative_tokens=speculative_tokens)
    listeners = []
    for _ in range(2):
        listeners += [submit(engine, prompt_of(seed), sampling=sampling)[1] for seed, sampling in REQUESTS]
        finish(engine)
    return listeners, model


@pytest.mark.parametrize("blocks", [60, 13], ids=["room for all", "hardly any room"])
def test_drafts_change_no_token(blocks: int):
    """With greedy decoding, sampling, log probabilities, biases, early ends and preemption, the output stays the same."""
    plain, plain_model = answers(0, blocks)
    drafted, model = answers(4, blocks)
    assert [listener.choices for listener in drafted] == [listener.choices for listener in plain]
    assert [listener.ends for listener in drafted] == [listener.ends for listener in plain]
    assert len(model.steps) < len(plain_model.steps)


def counted(prompt: Sequence[int], sampling: Sampling, speculative_tokens: int) -> tuple[Listener, list[list[int]]]:
    """Runs one request alone on a CountingModel; returns its listener and the steps."""
    model = CountingModel()
    engine = engine_of(model, token_budget=64, speculative_tokens=speculative_tokens)
    listener = submit(engine, prompt, sampling=sampling)[1]
    finish(engine)
    return listener, model.steps


def test_repetition_takes_few_steps():
    """A repetitive text comes at five tokens a step once drafts have been right."""
    sampling = Sampling(max_tokens=60, ignore_eos=True)
    listener, steps = counted(ROUND, sampling, 4)
    assert listener.tokens == [(3 + i) % VOCABULARY for i in range(60)]
    assert len(steps) <= 1 + 60 / 5 + 2


def test_an_end_among_right_drafts_is_the_end():
    """If a stop token is among right drafts, no token after it is sent."""
    listener, steps = counted(ROUND, Sampling(max_tokens=60), 8)
    assert listener.tokens == list(range(3, STOP + 1))
    assert listener.end is not None
    assert listener.end.finish is FinishReason.STOP
    assert len(steps) < STOP - 2


def test_drafts_stay_within_max_tokens():
    """No drafts are computed beyond a request's last token."""
    listener, steps = counted(ROUND, Sampling(max_tokens=3, ignore_eos=True), 8)
    assert listener.tokens == [3, 4, 5]
    assert sum(map(len, steps)) == len(ROUND) + 2


def test_penalised_requests_do_not_draft():
    """With a penalty, each token changes the next logits, so every step computes one token."""
    sampling = Sampling(max_tokens=10, ignore_eos=True, presence_penalty=0.1)
    _, steps = counted(ROUND, sampling, 4)
    assert [len(step) for step in steps] == [len(ROUND), *[1] * 9]


def test_prompts_go_before_drafts():
    """Drafts use only what decoding and prompts leave of the token budget, so they do not delay prompts."""
    model = CountingModel()
    engine = engine_of(model, token_budget=10, blocks=60, revision=None, speculative_tokens=4)
    submit(engine, ROUND, sampling=Sampling(max_tokens=60, ignore_eos=True))
    for _ in range(8):
        engine.step()
    assert len(model.steps[-1]) == 5
    submit(engine, list(range(31)) * 2, sampling=Sampling(max_tokens=2, ignore_eos=True))
    model.steps.clear()
    engine.step()
    assert len(model.steps[0]) == 10
    assert model.steps[0][1:] == list(range(9))
    finish(engine)
