"""How many threads a call may use: each thread's own number, and no influence on any bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from moiety_kernels.cpu.library import load
from moiety_kernels.ops.expert_mlp import ExpertWeights, grouped_expert_mlp
from moiety_kernels.ops.linear import linear
from moiety_kernels.ops.paged_attention import paged_attention
from moiety_kernels.threads import most_threads, use_threads


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """This thread asks torch again afterwards."""
    yield
    use_threads(0)


def noise(*shape: int) -> torch.Tensor:
    """Always the same, in bfloat16."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).bfloat16()


def linear_layer() -> torch.Tensor:
    """A decode batch times a large matrix."""
    return linear(noise(48, 1024), noise(2048, 1024))


def experts() -> torch.Tensor:
    """Unevenly many rows for four experts."""
    weights = [ExpertWeights(noise(1024, 512) / 16, noise(512, 512) / 16) for _ in range(4)]
    return grouped_expert_mlp(noise(128, 512), [60, 4, 63, 1], weights, activation="silu")


def attention() -> torch.Tensor:
    """A token each of 32 sequences."""
    tables = torch.arange(32 * 8, dtype=torch.int32).view(32, 8)
    pool = noise(32 * 8, 4, 16, 64)
    sequence, length = torch.arange(32, dtype=torch.int32), torch.full((32,), 128, dtype=torch.int32)
    return paged_attention(noise(32, 16, 64), pool, pool.roll(1, 0), tables, sequence, length, scale=0.125)


@pytest.mark.skipif(load() is None, reason="no C++ kernels here, and torch makes no such promise")
@pytest.mark.parametrize("compute", [linear_layer, experts, attention])
def test_threads_change_no_bit(compute: Callable[[], torch.Tensor]):
    """With work enough for several threads, and more of them than cores, every kernel answers as with one."""
    use_threads(1)
    alone = compute()
    for threads in (2, 5):
        use_threads(threads)
        assert torch.equal(compute(), alone)


def test_each_thread_has_its_own_number():
    """What one thread may use says nothing about another; without a number torch's counts."""
    use_threads(3)
    assert most_threads() == 3
    with ThreadPoolExecutor(1) as other:
        assert other.submit(most_threads).result() == torch.get_num_threads()
    assert most_threads() == 3
