"""Routers and experts while they learn."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3MoeForCausalLM

from moiety.training.model import build
from moiety.training.routing import Routing, dropped, routers, routings
from support.small_training import SMALL

IDS = torch.arange(64).reshape(2, 32)


def forward(model: Qwen3MoeForCausalLM, ids: torch.Tensor = IDS) -> torch.Tensor:
    """The logits of a batch."""
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_the_balance_loss_is_one_where_experts_are_used_alike_and_their_number_where_one_is() -> None:
    """The load-balancing loss of even use is 1; where one of four experts takes all with certainty, it is 4."""
    even = Routing(torch.zeros(8, 4), torch.arange(8).reshape(8, 1) % 4)
    one = Routing(torch.tensor([[50.0, 0, 0, 0]] * 8), torch.zeros(8, 1, dtype=torch.int64))
    assert even.balance_loss().item() == pytest.approx(1.0)
    assert one.balance_loss().item() == pytest.approx(4.0)
    assert one.z_loss().item() == pytest.approx(2500.0)


def test_it_computes_what_transformers_does() -> None:
    """Without dropped choices and noise, logits are those of transformers' own model with the same weights."""
    model = build(SMALL, seed=1, capacity_factor=None)
    plain = Qwen3MoeForCausalLM(SMALL.config())
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(forward(model.train()), forward(plain.eval()), rtol=1e-4, atol=1e-5)


def test_capacity_drops_choices_while_training_only() -> None:
    """With half of the even share as capacity, at least half of the choices are dropped; none once the model is trained."""
    model = build(SMALL, seed=1, capacity_factor=0.5)
    forward(model.train())
    assert 0.5 <= dropped(model) < 1
    forward(model.eval())
    assert dropped(model) == 0


def test_noise_changes_choices_but_no_weights() -> None:
    """Noise changes choices while training, not the logits that weights come from; a trained model has none."""
    model = build(SMALL, seed=1, capacity_factor=None).train()
    forward(model)
    (before, *_) = routings(model)
    for router in routers(model):
        router.noise = 10.0
    forward(model)
    (noisy, *_) = routings(model)
    assert not torch.equal(noisy.chosen, before.chosen)
    torch.testing.assert_close(noisy.logits, before.logits)
    forward(model.eval())
    assert torch.equal(routings(model)[0].chosen, before.chosen)
