"""Shared experts are computed during the hop, and the logits stay the same to the bit."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest
import torch
from torch import nn

from moiety.core.expert_backend import ComputedRows, PendingRows
from moiety.model.seam import MOE_LAYER, forward_context, remote_experts
from moiety.model.trunk import shared_expert_overlap
from moiety.model.trunk.read import load_trunk

TOKENS = torch.randint(3, 320, (1, 23), generator=torch.Generator().manual_seed(0))
SHARED = {"qwen2_moe": 3, "deepseek_v3": 3, "deepseek_v2": 3}  # MoE layers of the tiny checkpoints


class HopTracker:
    """Forwards calls to other experts, and knows whether a hop is in flight."""

    def __init__(self, experts: Any):
        self.experts, self.in_flight = experts, False

    def submit(self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor) -> PendingRows:
        pending = self.experts.submit(layer, hidden, top_k_index)
        self.in_flight = True
        return TrackedRows(self, pending)


class TrackedRows:
    """Rows whose hop ends when `result` is called."""

    def __init__(self, backend: HopTracker, pending: PendingRows):
        self._backend, self._pending = backend, pending

    def result(self) -> torch.Tensor:
        self._backend.in_flight = False
        return self._pending.result()


@pytest.mark.parametrize("architecture", SHARED)
def test_shared_experts_are_computed_during_the_hop(open_tiny, make_experts, architecture: str):
    """All shared experts run during the hop, called before or after the routed ones; logits keep their bits."""
    checkpoint, layout = open_tiny(architecture)
    router = load_trunk(checkpoint, layout, torch.float32)
    backend = HopTracker(make_experts(checkpoint, layout))
    seen: list[bool] = []
    for name, module in router.named_modules():
        if "shared_expert" in name and name.endswith("down_proj"):
            module.register_forward_hook(lambda *_: seen.append(backend.in_flight))
    with forward_context(backend), torch.inference_mode():
        expected = router(TOKENS).logits
        assert not any(seen)
        assert (
            shared_expert_overlap.overlap_shared_experts(router, lambda: router(TOKENS[:, :3]).logits)
            == SHARED[architecture]
        )
        seen.clear()
        for _ in range(2):
            assert torch.equal(router(TOKENS).logits, expected)
    assert seen == [True] * 2 * SHARED[architecture]


@pytest.mark.parametrize("architecture", ["qwen2_moe", "deepseek_v3"])
def test_lanes_keep_their_own_shared_outputs(open_tiny, make_experts, architecture: str):
    """Two forwards of one model, each submitting layers before the other's results, give the same bits as alone."""
    checkpoint, layout = open_tiny(architecture)
    router = load_trunk(checkpoint, layout, torch.float32)
    experts = make_experts(checkpoint, layout)
    barrier = threading.Barrier(2, timeout=20)

    class InStep(HopTracker):
        """Submits a layer, then waits until the other lane has submitted its own."""

        def submit(self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor) -> PendingRows:
            pending = super().submit(layer, hidden, top_k_index)
            barrier.wait()
            return pending

    lanes = [TOKENS[:, :5], TOKENS[:, 5:10]]
    with forward_context(experts), torch.no_grad():
        expected = [router(ids).logits for ids in lanes]
        assert shared_expert_overlap.overlap_shared_experts(router, lambda: router(TOKENS[:, :3]).logits)
    logits: dict[int, torch.Tensor] = {}

    def forward(lane: int) -> None:
        with forward_context(InStep(experts)), torch.no_grad():
            logits[lane] = router(lanes[lane]).logits

    threads = [threading.Thread(target=forward, args=(lane,)) for lane in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for lane in (0, 1):
        assert torch.equal(logits[lane], expected[lane])


def test_models_without_shared_experts_are_left_alone(open_tiny, make_experts):
    """Without shared experts nothing is installed, and the model is not run."""
    router = load_trunk(*open_tiny("mixtral"), torch.float32)
    assert shared_expert_overlap.overlap_shared_experts(router, lambda: pytest.fail("run")) == 0


class Block(nn.Module):
    """A MoE block of no published model; if `early`, it reads the shared expert's result before the routed ones run."""

    def __init__(self, early: bool):
        super().__init__()
        self.experts, self.shared_mlp, self.early = Experts(), nn.Linear(8, 8), early
        MOE_LAYER.set(self.experts, 0)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        shared = self.shared_mlp(hidden)
        if self.early:
            shared = shared * 2
        ids = torch.zeros(len(hidden), 1, dtype=torch.long)
        return self.experts(hidden, ids, torch.ones(len(hidden), 1)) + shared


class Experts(nn.Module):
    """Routed experts behind the seam."""

    def forward(self, *arguments: torch.Tensor) -> torch.Tensor:
        return remote_experts(self, *arguments)


class Echo:
    """Experts that return their input rows."""

    def submit(self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor) -> PendingRows:
        return ComputedRows(hidden[:, None])


@pytest.mark.parametrize("early", [False, True])
def test_a_result_that_is_read_too_early_is_not_put_off(early: bool, caplog: pytest.LogCaptureFixture):
    """A block that reads its shared expert's result before the routed ones run is left as it was, with a warning."""
    model, rows = nn.Sequential(Block(early)), torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    with forward_context(Echo()), torch.no_grad(), caplog.at_level(logging.WARNING):
        expected = model(rows)
        assert shared_expert_overlap.overlap_shared_experts(model, lambda: model(rows)) == (0 if early else 1)
        assert torch.equal(model(rows), expected)
    assert len(caplog.records) == int(early)
