"""The floor of a decode step, from a checkpoint's headers and a machine's speed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from moiety.bench.serve.floor import StepCost
from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.experts.cached import expert_layout
from moiety.tools.machine_speed import MachineSpeed

COST = StepCost(router=1000, expert=100, moe_layers=2, experts=8, top_k=2)


def test_activated_experts() -> None:
    """One token activates its top-k experts; many tokens activate all experts."""
    assert COST.activated(1) == pytest.approx(2)
    assert COST.activated(2) == pytest.approx(8 * (1 - 0.75**2))
    assert COST.activated(1000) == pytest.approx(8)


def test_floor_adds_reading_and_computing() -> None:
    """The floor is weight bytes over the bandwidth plus two operations per parameter and token over the matrix rate."""
    speed = MachineSpeed(read_bytes_per_s=1000.0, bfloat16_flops=100.0, float32_flops=50.0)
    streamed = 1000 * 2 + 2 * 2 * 100 * 2
    flops = 2 * (1000 + 2 * 2 * 100)
    assert COST.floor_s(1, speed, "bfloat16") == pytest.approx(streamed / 1000 + flops / 100)
    assert COST.floor_s(1, speed, "float32") == pytest.approx(2 * streamed / 1000 + flops / 50)
    narrow = 1000 * 2 + 2 * 2 * 100 * 1
    assert COST.floor_s(1, speed, "bfloat16", expert_width=1.0) == pytest.approx(narrow / 1000 + flops / 100)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
def test_cost_of_a_checkpoint(tiny: Callable[[str], str], architecture: str) -> None:
    """Every parameter but the input embedding's is counted once, as a router's or an expert's."""
    checkpoint = Checkpoint.open(tiny(architecture))
    layout = expert_layout(checkpoint)
    cost, shape = StepCost.of(checkpoint, layout), layout.shape
    stored = sum(entry.end - entry.start for entry in checkpoint.tensors.values()) // 4  # float32
    embedding = shape.vocabulary * shape.mlp.hidden
    assert cost.router + cost.expert * shape.moe_layers * shape.experts == stored - embedding
    bias = 2 * shape.mlp.intermediate + shape.mlp.hidden if shape.mlp.biased else 0
    assert cost.expert == 3 * shape.mlp.hidden * shape.mlp.intermediate + bias
