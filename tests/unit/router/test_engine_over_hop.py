"""The whole engine with real models over a real hop: pressure, prefixes and choices change no token."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from engine_support import Listener

from moiety.core.experts import ExpertSet
from moiety.core.sampling import Sampling
from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.experts.cached import expert_layout
from moiety.model.trunk.read import load_trunk
from moiety.router.attention import paged
from moiety.router.cache.kv_cache import KVCache
from moiety.router.engine import Engine
from moiety.router.hop.hop import Hop
from moiety.router.layer_discovery import discover_cache_spec
from moiety.router.sequence.sequence import Sequence as Request
from moiety.router.step_runner import StepRunner
from moiety.telemetry.tracing import NO_TRACER
from moiety.testing import FakeExperts, loopback_hop

COMMON = list(range(40, 65))  # a block and more
PROMPTS = [[*COMMON, 5, 6, 7, 4], [*COMMON, 8, 9, 10, 11, 12], [*COMMON[:13], 12, 13], list(range(100, 146))]
NEW_TOKENS = 8  # each of these comes to one block more than its prompt has
GREEDY = Sampling(max_tokens=NEW_TOKENS, ignore_eos=True)
CHOICES = Sampling(max_tokens=NEW_TOKENS, ignore_eos=True, temperature=0.8, seed=11, n=3)

Asked = tuple[list[int], Sampling, int]  # prompt, sampling, choice


def run(engine: Engine, asked: Sequence[Asked]) -> list[dict[int, list[int]]]:
    """What each request gets, choice by choice, when all come at once."""
    listeners = []
    for number, (prompt, sampling, choice) in enumerate(asked):
        listeners.append(listener := Listener())
        engine.submit(Request(str(number), list(prompt), len(prompt), sampling, frozenset(), listener, choice=choice))
    while engine.step():
        pass
    engine.check_integrity()
    assert engine.load.free_blocks == engine.blocks
    assert all(end.error is None for listener in listeners for end in listener.ends.values())
    return [listener.choices for listener in listeners]


@functools.cache
def router_of(folder: str) -> tuple[Any, Any]:
    """A checkpoint's router model, and the shape of what it calls."""
    paged.register_paged_attention()
    checkpoint = Checkpoint.open(folder)
    layout = expert_layout(checkpoint)
    return load_trunk(checkpoint, layout, torch.float32, attention=paged.NAME), layout.shape


@pytest.mark.parametrize(
    "architecture",
    [
        "qwen3_moe",  # every layer sees everything
        "gpt_oss",  # every other layer has a window of 16 tokens, and sinks
    ],
)
def test_pressure_prefixes_and_choices_change_no_token(architecture: str, tiny: Callable[[str], str]):
    """All at once in six blocks, again with their prefixes known, and three choices in one request: as if alone."""
    model, shape = router_of(tiny(architecture))
    spec = discover_cache_spec(model, shape)

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
            waits=lambda *_: None,
            tracer=NO_TRACER,
        )

    async def scenario() -> None:
        held = ExpertSet.block(shape.moe_layers, range(shape.experts))
        async with loopback_hop([FakeExperts("all", held, shape)], shape) as loopback:

            def compare() -> None:
                asked = [*((prompt, GREEDY, 0) for prompt in PROMPTS), (PROMPTS[0], CHOICES, 0)]
                one_by_one = [
                    *asked[:-1],
                    *((PROMPTS[0], Sampling(NEW_TOKENS, 0.8, seed=11, ignore_eos=True), choice) for choice in range(3)),
                ]
                alone = [run(engine_of(loopback.hop, slots=1, blocks=100), [request])[0] for request in one_by_one]
                expected = [*alone[:-3], alone[-3] | alone[-2] | alone[-1]]
                pressed = engine_of(loopback.hop, slots=6, blocks=6)
                assert run(pressed, asked) == expected
                assert run(pressed, asked) == expected, "with what is left of their prefixes"

            await asyncio.to_thread(compare)

    asyncio.run(scenario())
