"""A layer's held experts: kernels get the same addresses and outputs from the table as from the experts themselves."""

from __future__ import annotations

import pytest
import torch
from expert_cases import HIDDEN, make_weights

from moiety_kernels import SWIGLU, grouped_expert_mlp
from moiety_kernels.weights.expert_table import ExpertTable, addresses

EXPERTS = {expert: make_weights(SWIGLU, torch.float32, expert, biased=expert != 5) for expert in (1, 2, 5, 9)}


@pytest.mark.parametrize("ids", [[1, 2, 5, 9], [9, 1], [5], []], ids=str)
def test_selected_experts_are_those_asked_for(ids: list[int]):
    """Weights and addresses come in the order of the ids; a tensor that an expert lacks has the address 0."""
    selected = ExpertTable(EXPERTS).select(ids)
    assert list(selected) == [EXPERTS[expert] for expert in ids]
    assert addresses(selected).tolist() == [list(EXPERTS[expert].pointers) for expert in ids]


def test_an_expert_that_is_not_held_is_an_error():
    """An id between held ones, or past them, raises KeyError instead of giving addresses of 0."""
    for missing in (3, 10):
        with pytest.raises(KeyError, match=str(missing)):
            ExpertTable(EXPERTS).select([1, missing])


def test_a_batch_from_the_table_has_the_bits_of_one_from_a_list():
    """Both ways reach the same kernel with the same weights."""
    biased = {expert: EXPERTS[expert] for expert in (1, 2, 9)}
    rows = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(0))
    from_table = grouped_expert_mlp(rows, [1, 2, 3], ExpertTable(biased).select([9, 2, 1]))
    assert torch.equal(from_table, grouped_expert_mlp(rows, [1, 2, 3], [biased[9], biased[2], biased[1]]))
