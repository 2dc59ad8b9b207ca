"""Linear layers and RMS norms: against float64, and bit for bit against themselves in other batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from moiety_kernels.ops.linear import linear
from moiety_kernels.ops.rms_norm import rms_norm

BOUND = {torch.float32: 1e-6, torch.bfloat16: 8e-3}  # largest error over largest output: bfloat16 rounds to 2^-8
# Factors on the bound: torch's libraries may add 9000 products one after the other, an error of 1.6e-6 on an AMD EPYC.
LOOSER = {"C++": 1, "torch": 4}


def normal(seed: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Returns normally distributed values, the same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rows", "depth", "width"),
    [
        (1, 64, 128),  # decode of one sequence
        (5, 70, 33),  # no multiple of any vector width
        (7, 3, 1),  # less than one vector, one column
        (32, 256, 100),  # a decode batch; the last chunk of columns is not full
        (200, 64, 65),  # more rows than one packing holds
        (2, 9000, 8),  # deeper than one part of a product
        (0, 64, 8),  # nothing to do
    ],
)
def test_linear_is_within_rounding_of_float64(
    kernels: str, rows: int, depth: int, width: int, dtype: torch.dtype, biased: bool
):
    """x W^T + b stays within float32 rounding of float64 for every shape of batch and weight."""
    x, weight = normal(1, rows, depth, dtype=dtype), normal(2, width, depth, dtype=dtype)
    bias = normal(3, width, dtype=dtype) if biased else None
    out = linear(x, weight, bias)
    expected = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert (out.dtype, out.shape) == (dtype, expected.shape)
    if rows:
        assert (out.double() - expected).abs().max() <= BOUND[dtype] * LOOSER[kernels] * expected.abs().max()


def test_linear_reads_slices_in_place(kernels: str):
    """Rows and weights that are slices of larger tensors give the bits of contiguous copies."""
    x, weight = normal(1, 4, 128, dtype=torch.bfloat16), normal(2, 32, 128, dtype=torch.bfloat16)
    out = linear(x[:, 32:96], weight[:, 32:96])
    torch.testing.assert_close(out, linear(x[:, 32:96].contiguous(), weight[:, 32:96].contiguous()), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 300), depth=st.sampled_from([33, 64, 256]), place=st.floats(0, 0.999))
def test_deterministic_linear_does_not_depend_on_the_batch(
    kernels: str, dtype: torch.dtype, rows: int, depth: int, place: float
):
    """With `deterministic` a row has the same bits alone and at any position among other rows."""
    x, weight = normal(rows, rows, depth, dtype=dtype), normal(2, 48, depth, dtype=dtype)
    row = int(place * rows)
    alone = linear(x[row : row + 1], weight, deterministic=True)
    assert torch.equal(alone[0], linear(x, weight, deterministic=True)[row])


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norm_is_within_rounding_of_float64(kernels: str, dtype: torch.dtype, late: bool):
    """Both ways of rounding meet their bound, with leading dimensions and a width that fits no vector."""
    x, weight = normal(1, 2, 3, 70, dtype=dtype) * 4, normal(2, 70, dtype=dtype)
    out = rms_norm(x, weight, 1e-6, offset=1.0, late=late)
    wide = x.double()
    expected = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * (weight.double() + 1)
    assert (out.dtype, out.shape) == (dtype, x.shape)
    assert (out.double() - expected).abs().max() <= 2 * BOUND[dtype] * expected.abs().max()
    assert torch.equal(rms_norm(x[1, 2], weight, 1e-6, offset=1.0, late=late), out[1, 2])
