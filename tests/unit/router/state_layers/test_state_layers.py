"""Hybrids through the engine against plain transformers: no state is lost, mixed up or partly written."""

from __future__ import annotations

import logging
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_support import Listener, NoHop, finish, submit
from state_support import (
    HYBRIDS,
    NEW_TOKENS,
    SHAPE,
    engine_on,
    hybrid,
    layers_of,
    prompt_of,
    reference,
    served,
    transformers_tokens,
)

from moiety.core.sampling import Sampling
from moiety.errors import CheckpointError, HopFailed, MoietyError, NoHolder
from moiety.model.seam import forward_context
from moiety.router.attention import paged
from moiety.router.attention.step_batch import StepBatch
from moiety.router.cache.blocks import BlockTable
from moiety.router.cache.kv_cache import KVCache
from moiety.router.engine import Engine
from moiety.router.lanes import Lanes
from moiety.router.state_layers.batched_layer import batched_state_layers
from moiety.router.trunk import prepare_trunk

GREEDY = Sampling(max_tokens=NEW_TOKENS, ignore_eos=True)
LENGTHS = (3, 9, 17, 40, 25, 1, 9)
CPU = torch.device("cpu")
# These cover each way to keep a state; the others add nothing to the fast suite.
QUICK = ("jamba", "minimax", "lfm2_moe", "zaya", "qwen3_next")
FAMILIES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in HYBRIDS]


def submit_all(architecture: str, engine: Engine) -> list[tuple[Listener, list[int]]]:
    """Submits prompts of different lengths; returns each listener with transformers' tokens."""
    prompts = [prompt_of(seed, length) for seed, length in enumerate(LENGTHS)]
    return [
        (submit(engine, prompt, sampling=GREEDY)[1], transformers_tokens(architecture, prompt)) for prompt in prompts
    ]


@pytest.mark.parametrize("architecture", FAMILIES)
def test_logits_are_those_of_a_cache_for_each_sequence(architecture: str) -> None:
    """Each token's logits of two texts, packed in chunks and single tokens, equal transformers'."""
    model, spec = served(architecture)
    assert any(layer.forgetful for layer in batched_state_layers(model)) is (architecture == "jamba")
    texts = [torch.tensor([prompt_of(seed, 30)]) for seed in range(2)]
    with torch.inference_mode():
        expected = [reference(architecture)(text).logits[0] for text in texts]
    cache = KVCache(spec, 1 << 20, CPU, slots=2)
    tables, past = [BlockTable(), BlockTable()], [0, 0]
    found: list[list[torch.Tensor]] = [[], []]
    for counts in ((9, 5), (1, 20), (7, 1), (1, 1), (12, 3)):
        for table, computed, count in zip(tables, past, counts, strict=True):
            cache.grow(table, computed + count)
        batch = StepBatch.build(cache, tables, past, counts, CPU)
        ids = torch.cat([t[0, a : a + n] for t, a, n in zip(texts, past, counts, strict=True)])
        for _ in range(2):  # a step may be run again
            with torch.inference_mode(), forward_context(NoHop(), batch):
                output = model(input_ids=ids[None], position_ids=batch.positions[None])
        for which, logits in enumerate(output.logits[0].split(counts)):
            found[which].append(logits)
            past[which] += counts[which]
            cache.commit(tables[which], texts[which][0].tolist(), past[which], "")
    for which in range(2):
        torch.testing.assert_close(torch.cat(found[which]), expected[which], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_any_schedule_gives_the_tokens_of_transformers(architecture: str) -> None:
    """With random arrivals, choices, cancellations, lost experts and preemption, the output is transformers', up to its end."""
    chance = random.Random(architecture)
    model, spec = served(architecture)
    engine = engine_on(model, spec, slots=3, token_budget=11, blocks=16)
    tokens = 0

    def note(_: Any, __: Any, options: dict[str, Any]) -> None:
        nonlocal tokens
        tokens = options["input_ids"].shape[1]

    def lose(*_: Any) -> None:
        if chance.random() < 0.01:
            raise HopFailed([chance.randrange(tokens)], NoHolder(0, [3], 30.0))

    model.register_forward_pre_hook(note, with_kwargs=True)
    for layer in layers_of(model):
        layer.register_forward_pre_hook(lose)
    requests = []
    for _ in range(70):
        if len(requests) < 14 and chance.random() < 0.3:
            prompt = prompt_of(chance.randrange(5), chance.choice((1, 2, 7, 12, 30)))
            sampling = replace(GREEDY, n=chance.choice((1, 1, 1, 3)))
            requests.append((prompt, sampling, *submit(engine, prompt, sampling=sampling)))
        if requests and chance.random() < 0.03:
            engine.cancel(chance.choice(requests)[2])
        engine.step()
        engine.check_integrity()
    finish(engine)
    done = 0
    for prompt, sampling, _, listener in requests:
        assert sorted(listener.ends) == list(range(sampling.n))
        for choice, end in listener.ends.items():
            got = listener.choices[choice]
            assert got == transformers_tokens(architecture, prompt)[: len(got)]
            assert isinstance(end.error, MoietyError) or len(got) == NEW_TOKENS
            done += end.error is None
    assert done >= 5


def test_an_expert_lost_in_the_middle_of_a_step_leaves_states_as_they_were() -> None:
    """A step that fails after its last layer runs again from the old states, without the failed sequence."""
    model, spec = served("qwen3_next")
    engine = engine_on(model, spec, slots=len(LENGTHS), token_budget=200)
    texts = submit_all("qwen3_next", engine)
    failures = iter([False] * 3 + [True, False] * 2 + [False] * 100)

    def lose(*_: Any) -> None:
        if next(failures):
            raise HopFailed([0], NoHolder(0, [3], 30.0))

    layers_of(model)[-1].register_forward_hook(lose)
    finish(engine)
    lost = [listener for listener, _ in texts if listener.end is not None and listener.end.error is not None]
    assert len(lost) == 2
    for listener, expected in texts:
        assert listener.tokens == (expected[: len(listener.tokens)] if listener in lost else expected)


def test_lanes_keep_their_own_states() -> None:
    """Two forward passes that switch after every layer write only to their own sequences' slots."""
    model, spec = served("qwen3_next")
    lanes = Lanes(lambda _: None)
    turns: list[int] = []

    def give_way(*_: Any) -> None:
        turns.append(1)
        lanes.wait(0.0)

    for layer in layers_of(model):
        layer.register_forward_hook(give_way)
    engine = engine_on(model, spec, slots=len(LENGTHS), token_budget=40, lanes=lanes)
    texts = submit_all("qwen3_next", engine)
    finish(engine)
    assert [listener.tokens for listener, _ in texts] == [expected for _, expected in texts]
    assert turns


def test_a_layer_that_drops_its_state_is_logged_and_served_token_by_token(caplog: pytest.LogCaptureFixture) -> None:
    """Jamba's Mamba layers drop their state at every chunk: one warning at start, and still transformers' tokens."""
    with caplog.at_level(logging.WARNING):
        model, spec = served("jamba")
    (warning,) = [
        record.message for record in caplog.records if record.name == "moiety.router.state_layers.state_discovery"
    ]
    assert warning.startswith("JambaMambaMixer drops its state at the second chunk of a prompt")
    engine = engine_on(model, spec, token_budget=7)
    texts = submit_all("jamba", engine)
    finish(engine)
    assert [listener.tokens for listener, _ in texts] == [expected for _, expected in texts]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", HYBRIDS)
def test_the_trial_at_start_judges_bf16_like_fp32(architecture: str) -> None:
    """The trial does not take bf16 rounding for a dropped state, and fp32 states stay fp32."""
    model, spec = served(architecture, torch.bfloat16)
    assert any(layer.forgetful for layer in batched_state_layers(model)) is (architecture == "jamba")
    assert {state.dtype for state in spec.states.values()} <= {torch.float32, torch.bfloat16}
    engine = engine_on(model, spec)
    texts = [submit(engine, prompt_of(seed, length), sampling=GREEDY)[1] for seed, length in enumerate((3, 20, 9))]
    finish(engine)
    assert [len(listener.tokens) for listener in texts] == [NEW_TOKENS] * 3


def test_a_state_with_other_results_in_steps_is_refused() -> None:
    """A module with other results token by token than in one step is refused, as its tokens would be wrong."""
    model = hybrid("lfm2_moe")
    model.set_attn_implementation(paged.NAME)
    module = next(module for module in model.modules() if type(module).__name__ == "Lfm2MoeShortConv")
    forward = module.forward

    def uneven(**options: Any) -> torch.Tensor:
        return forward(**options) + options["hidden_states"].shape[1]

    module.forward = uneven
    with pytest.raises(CheckpointError, match=r"lfm2_moe: layer 0 gives other results token by token than in one step"):
        prepare_trunk(model, SHAPE)
