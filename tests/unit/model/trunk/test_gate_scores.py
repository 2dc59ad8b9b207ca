"""What gates think of every expert is heard where it says who is next best, and refused where it does not."""

from __future__ import annotations

import pytest
import torch

from moiety.errors import ConfigError
from moiety.model.seam import current_context, use_backend
from moiety.model.trunk import gate_scores
from moiety.model.trunk.read import load_trunk

TOKENS = torch.randint(3, 320, (1, 9), generator=torch.Generator().manual_seed(0))


class Asking:
    """Computes rows elsewhere, and notes the scores and the choice of each layer."""

    def __init__(self, experts):
        self._experts, self.seen = experts, []

    def submit(self, layer, hidden, top_k_index):
        self.seen.append((current_context().scores, top_k_index))
        return self._experts.submit(layer, hidden, top_k_index)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe", "qwen2_moe"])
def test_scores_are_those_that_the_choice_was_made_by(open_tiny, make_experts, architecture: str):
    """Every layer's scores are there when its experts are called, and their highest are the experts called."""
    checkpoint, layout = open_tiny(architecture)
    router = load_trunk(checkpoint, layout, torch.float32)
    backend = Asking(make_experts(checkpoint, layout))

    def run() -> None:
        with use_backend(backend), torch.inference_mode():
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
    """DeepSeek-V3 picks groups of experts first and corrects scores by a bias: its next best cannot be told."""
    checkpoint, layout = open_tiny("deepseek_v3")
    router = load_trunk(checkpoint, layout, torch.float32)
    backend = Asking(make_experts(checkpoint, layout))

    def run() -> None:
        with use_backend(backend), torch.inference_mode():
            router(TOKENS)

    with pytest.raises(ConfigError, match=r"overflow = 'backup': deepseek_v3's gates do not tell"):
        gate_scores.record_gate_scores(router, layout.shape, run)
