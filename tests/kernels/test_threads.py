"""How many threads a call may use: a number per calling thread, which changes no bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from moiety_kernels.cpu.library import load
from moiety_kernels.ops.expert_mlp import grouped_expert_mlp
from moiety_kernels.ops.linear import linear
from moiety_kernels.ops.paged_attention import paged_attention
from moiety_kernels.reference.attention import AttentionOptions
from moiety_kernels.threads import set_thread_limit, thread_limit
from moiety_kernels.weights.expert_weights import ExpertWeights


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Returns this thread to torch's number afterwards."""
    yield
    set_thread_limit(0)


def noise(*shape: int) -> torch.Tensor:
    """Returns the same bfloat16 noise in every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).bfloat16()


def linear_layer() -> torch.Tensor:
    """Multiplies a decode batch by a large matrix."""
    return linear(noise(48, 1024), noise(2048, 1024))


def experts() -> torch.Tensor:
    """Runs an uneven spread of rows through four experts."""
    weights = [ExpertWeights(noise(1024, 512) / 16, noise(512, 512) / 16) for _ in range(4)]
    return grouped_expert_mlp(noise(128, 512), [60, 4, 63, 1], weights)


def attention() -> torch.Tensor:
    """Attends one token of each of 32 sequences."""
    tables = torch.arange(32 * 8, dtype=torch.int32).view(32, 8)
    pool = noise(32 * 8, 4, 16, 64)
    sequence, length = torch.arange(32, dtype=torch.int32), torch.full((32,), 128, dtype=torch.int32)
    return paged_attention(noise(32, 16, 64), pool, pool.roll(1, 0), tables, sequence, length, AttentionOptions(0.125))


@pytest.mark.skipif(load() is None, reason="no C++ kernels here; torch does not guarantee this")
@pytest.mark.parametrize("compute", [linear_layer, experts, attention])
def test_threads_change_no_bit(compute: Callable[[], torch.Tensor]):
    """With work for several threads, and more threads than cores, every kernel gives the bits of one thread."""
    set_thread_limit(1)
    alone = compute()
    for threads in (2, 5):
        set_thread_limit(threads)
        assert torch.equal(compute(), alone)


def test_each_thread_has_its_own_number():
    """The number set in one thread does not affect another, which uses torch's number."""
    set_thread_limit(3)
    assert thread_limit() == 3
    with ThreadPoolExecutor(1) as other:
        assert other.submit(thread_limit).result() == torch.get_num_threads()
    assert thread_limit() == 3
