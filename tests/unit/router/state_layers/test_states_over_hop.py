"""States with a real hop: a replica that dies in the middle of a step damages no state."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
import torch
from engine_support import Listener, submit
from state_support import engine_on

from moiety.core.experts import ExpertSet
from moiety.core.sampling import Sampling
from moiety.errors import NoHolder
from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.experts.cached import expert_layout
from moiety.model.trunk.read import load_trunk
from moiety.router.attention import paged
from moiety.router.trunk import prepare_trunk
from moiety.testing import FakeExperts, loopback_hop
from moiety.wire.frames import ForwardCall

PROMPTS = [list(range(40, 40 + length)) for length in (3, 9, 17, 26)]
SAMPLING = Sampling(max_tokens=8, ignore_eos=True)


@pytest.mark.parametrize("covered", [True, False], ids=["another holder", "no holder"])
async def test_a_replica_that_dies_in_a_step_costs_no_state(covered: bool, tiny: Callable[[str], str]) -> None:
    """When a replica dies after some Jamba layers wrote states, all tokens sent are those of an undisturbed run."""
    checkpoint = Checkpoint.open(tiny("jamba"))
    layout = expert_layout(checkpoint)
    shape = layout.shape
    model = load_trunk(checkpoint, layout, torch.float32, attention=paged.NAME)
    spec = prepare_trunk(model, shape)
    dying: set[str] = set()

    async def on_call(call: ForwardCall) -> None:
        if dying and call.layer == 1:  # the last MoE layer, after all Mamba layers but one
            dying.clear()
            task = asyncio.create_task(doomed.vanish())
            await asyncio.sleep(30)
            await task

    everywhere = range(shape.experts)
    doomed = FakeExperts("doomed", ExpertSet.uniform(shape.moe_layers, everywhere[-1:]), shape, on_call=on_call)
    others = everywhere if covered else everywhere[:-1]
    replicas = [doomed, FakeExperts("well", ExpertSet.uniform(shape.moe_layers, others), shape)]
    async with loopback_hop(replicas, shape, expert_wait_s=0.2) as loopback:

        def compare() -> None:
            texts: list[list[Listener]] = []
            for disturbed in (False, True):
                engine = engine_on(model, spec, token_budget=20, backend=loopback.hop)
                texts.append([submit(engine, prompt, sampling=SAMPLING)[1] for prompt in PROMPTS])
                for step in range(1000):
                    if disturbed and step == 3:
                        dying.add("now")
                    if not engine.step():
                        break
                engine.check_integrity()
            assert not dying, "no replica died: the test tests nothing"
            assert covered or any(listener.end and listener.end.error for listener in texts[1])
            for undisturbed, listener in zip(*texts, strict=True):
                assert listener.end is not None
                if covered:
                    assert listener.tokens == undisturbed.tokens
                else:
                    assert isinstance(listener.end.error, NoHolder | None)
                    assert listener.tokens == undisturbed.tokens[: len(listener.tokens)]
                    assert listener.end.error or len(listener.tokens) == 8

        await asyncio.to_thread(compare)
