"""Gate scores are recorded if they tell the next best expert; other gates are refused."""

from __future__ import annotations

import pytest
import torch

from moiety.errors import ConfigError
from moiety.model.seam import current_context, forward_context
from moiety.model.trunk import gate_scores
from moiety.model.trunk.read import load_trunk

TOKENS = torch.randint(3, 320, (1, 9), generator=torch.Generator().manual_seed(0))


class RecordingExperts:
    """Forwards rows to other experts, and records the scores and the choice of each layer."""

    def __init__(self, experts):
        self._experts, self.seen = experts, []

    def submit(self, layer, hidden, top_k_index):
        self.seen.append((current_context().scores, top_k_index))
        return self._experts.submit(layer, hidden, top_k_index)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe", "qwen2_moe"])
def test_the_chosen_experts_have_the_highest_scores(open_tiny, make_experts, architecture: str):
    """Every layer's scores are set when its experts are called, and the called experts have the highest scores."""
    checkpoint, layout = open_tiny(architecture)
    router = load_trunk(checkpoint, layout, torch.float32)
    backend = RecordingExperts(make_experts(checkpoint, layout))

    def run() -> None:
        with forward_context(backend), torch.inference_mode():
            router(TOKENS)

    gate_scores.record_gate_scores(router, layout.shape, run)
    backend.seen.clear()
    run()
    assert len(backend.seen) == layout.shape.moe_layers
    for scores, chosen in backend.seen:
        assert scores.shape == (TOKENS.numel(), layout.shape.experts)
        best = scores.topk(layout.shape.top_k, dim=-1).indices
        assert torch.equal(best.sort().values, chosen.sort().values)


def test_a_gate_that_chooses_by_groups_is_refused(open_tiny, make_experts):
    """DeepSeek-V3 is refused: it picks groups of experts first and corrects scores by a bias."""
    checkpoint, layout = open_tiny("deepseek_v3")
    router = load_trunk(checkpoint, layout, torch.float32)
    backend = RecordingExperts(make_experts(checkpoint, layout))

    def run() -> None:
        with forward_context(backend), torch.inference_mode():
            router(TOKENS)

    with pytest.raises(ConfigError, match=r"overflow = 'backup': deepseek_v3's gates do not give"):
        gate_scores.record_gate_scores(router, layout.shape, run)
