"""The engine with real models over a real hop: memory pressure, prefixes and choices change no token."""

from __future__ import annotations

import asyncio
import functools
from collections import abc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_support import Listener

from moiety.core.experts import ExpertSet, ModelShape
from moiety.core.sampling import Sampling
from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.experts.cached import expert_layout
from moiety.model.trunk.read import load_trunk
from moiety.router.attention import paged
from moiety.router.cache.cache_spec import CacheSpec
from moiety.router.cache.kv_cache import KVCache
from moiety.router.engine import Engine
from moiety.router.hop.hop import Hop
from moiety.router.sequence.sequence import Sequence
from moiety.router.step_runner import StepRunner
from moiety.router.trunk import prepare_trunk
from moiety.telemetry.tracing import NO_TRACER
from moiety.testing import FakeExperts, loopback_hop

COMMON = list(range(40, 65))  # more than one block
PROMPTS = [[*COMMON, 5, 6, 7, 4], [*COMMON, 8, 9, 10, 11, 12], [*COMMON[:13], 12, 13], list(range(100, 146))]
NEW_TOKENS = 8  # each output needs one block more than its prompt
GREEDY = Sampling(max_tokens=NEW_TOKENS, ignore_eos=True)
CHOICES = Sampling(max_tokens=NEW_TOKENS, ignore_eos=True, temperature=0.8, seed=11, n=3)

Ask = tuple[list[int], Sampling, int]  # prompt, sampling, choice


def run(engine: Engine, requests: abc.Sequence[Ask]) -> list[dict[int, list[int]]]:
    """Submits all requests at once; returns the tokens of each by choice."""
    listeners = []
    for number, (prompt, sampling, choice) in enumerate(requests):
        listeners.append(listener := Listener())
        engine.submit(Sequence(str(number), list(prompt), len(prompt), sampling, frozenset(), listener, choice=choice))
    while engine.step():
        pass
    engine.check_integrity()
    assert engine.load.free_blocks == engine.blocks
    assert all(end.error is None for listener in listeners for end in listener.ends.values())
    return [listener.choices for listener in listeners]


@functools.cache
def router_of(folder: str) -> tuple[Any, CacheSpec, ModelShape]:
    """Loads and prepares a checkpoint's trunk; returns it with its CacheSpec and the shape of its experts."""
    checkpoint = Checkpoint.open(folder)
    layout = expert_layout(checkpoint)
    model = load_trunk(checkpoint, layout, torch.float32, attention=paged.NAME)
    return model, prepare_trunk(model, layout.shape), layout.shape


@pytest.mark.parametrize(
    "architecture",
    [
        "qwen3_moe",  # full attention in every layer
        "gpt_oss",  # a window of 16 tokens in every other layer, and sinks
    ],
)
async def test_pressure_prefixes_and_choices_change_no_token(architecture: str, tiny: Callable[[str], str]):
    """Requests at once in six blocks, again with cached prefixes, and three choices in one get the tokens of running alone."""
    model, spec, shape = router_of(tiny(architecture))

    def engine_of(hop: Hop, *, slots: int, blocks: int) -> Engine:
        memory = blocks * 16 * spec.bytes_per_token
        cache = KVCache(spec, memory, torch.device("cpu"), revision="r")
        return Engine(
            StepRunner(model, cache, [hop]),
            cache,
            slots=slots,
            token_budget=32,
            queue_limit=100,
            threads=1,
            report_missing=lambda *_: None,
            tracer=NO_TRACER,
        )

    held = ExpertSet.uniform(shape.moe_layers, range(shape.experts))
    async with loopback_hop([FakeExperts("all", held, shape)], shape) as loopback:

        def compare() -> None:
            together = [*((prompt, GREEDY, 0) for prompt in PROMPTS), (PROMPTS[0], CHOICES, 0)]
            one_by_one = [
                *together[:-1],
                *((PROMPTS[0], Sampling(NEW_TOKENS, 0.8, seed=11, ignore_eos=True), choice) for choice in range(3)),
            ]
            alone = [run(engine_of(loopback.hop, slots=1, blocks=100), [request])[0] for request in one_by_one]
            expected = [*alone[:-3], alone[-3] | alone[-2] | alone[-1]]
            pressed = engine_of(loopback.hop, slots=6, blocks=6)
            assert run(pressed, together) == expected
            assert run(pressed, together) == expected, "with the prefixes that are still cached"

        await asyncio.to_thread(compare)
