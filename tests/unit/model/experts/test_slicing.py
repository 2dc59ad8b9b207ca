"""The outputs of an expert's slices add up to the expert's output, for every form of expert."""

from __future__ import annotations

import pytest
import torch

from moiety.core.experts import ExpertMLP, ExpertSet
from moiety.errors import ConfigError
from moiety.model.activation import activation_of
from moiety.model.experts.slicing import slice_of
from moiety.testing import fake_shape
from moiety_kernels import ExpertWeights, grouped_expert_mlp

FORMS = {
    "mixtral": ExpertMLP(8, 12),
    "gpt-oss": ExpertMLP(8, 12, "swiglu_clamped", interleaved=True, biased=True, limit=7.0, alpha=1.7),
    "plain": ExpertMLP(8, 12, "relu2", gated=False),
}


def random_expert(mlp: ExpertMLP, dtype: torch.dtype) -> ExpertWeights:
    """Makes weights of this form, the same on every call."""
    generator = torch.Generator().manual_seed(1)
    width = mlp.intermediate * (2 if mlp.gated else 1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype) / 2

    biases = (random(width), random(mlp.hidden)) if mlp.biased else (None, None)
    return ExpertWeights(random(width, mlp.hidden), random(mlp.hidden, mlp.intermediate), *biases)


def computed(expert: ExpertWeights, mlp: ExpertMLP, rows: torch.Tensor) -> torch.Tensor:
    """Computes one expert on the rows, in float32."""
    return grouped_expert_mlp(rows, [len(rows)], [expert], activation_of(mlp), dtype=torch.float32)


@pytest.mark.parametrize("slices", [2, 3])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_slices_add_up_to_their_expert(form: str, slices: int, dtype: torch.dtype) -> None:
    """Slices summed in float32 equal the whole expert: a bias counts once, and bfloat16 adds no rounding."""
    mlp = FORMS[form]
    expert, rows = random_expert(mlp, dtype), torch.randn(5, 8, generator=torch.Generator().manual_seed(2)).to(dtype)
    parts = [slice_of(expert, mlp, number, slices, dtype) for number in range(slices)]
    assert all(part.form[:2] == (8, 12 // slices) for part in parts)
    total = sum(computed(part, mlp, rows) for part in parts)
    assert total.dtype == torch.float32
    # both round gate and up to bfloat16 in the same way; only the order of the sum differs
    torch.testing.assert_close(total, computed(expert, mlp, rows), rtol=1e-5, atol=1e-5)


def test_slices_share_no_memory_with_their_expert() -> None:
    """One of two slices keeps half of the expert's bytes alive."""
    expert = random_expert(FORMS["gpt-oss"], torch.float32)
    part = slice_of(expert, FORMS["gpt-oss"], 1, 2, torch.float32)
    assert part.gate_up.untyped_storage().nbytes() * 2 == expert.gate_up.untyped_storage().nbytes()
    assert part.down.untyped_storage().nbytes() * 2 == expert.down.untyped_storage().nbytes()


def test_groups_hold_one_slice_of_each_expert_of_a_share() -> None:
    """In four groups of six experts in two slices, each slice has one holder and no group has both slices of an expert."""
    shape = fake_shape(layers=1, experts=6, hidden=8)
    plan = shape.sliced_partition(4, 2)
    assert [str(held) for held in plan] == ["0:0,2,4", "0:1,3,5", "0:6,8,10", "0:7,9,11"]
    assert shape.sliced_partition(3, 1) == shape.partition(3)
    with pytest.raises(ConfigError, match="groups = 3: must be a multiple of 2"):
        shape.sliced_partition(3, 2)


def test_a_slice_count_must_divide_the_experts() -> None:
    """A slice count that does not divide the intermediate size is refused: slices are equal."""
    shape = fake_shape(layers=1, experts=6, hidden=8)
    with pytest.raises(ConfigError, match=r"slices = 7: must divide \d+"):
        shape.sliced(7)
    assert shape.sliced(2).experts == 12
    assert ExpertSet.uniform(1, range(12)) == shape.sliced(2).partition(1)[0]
