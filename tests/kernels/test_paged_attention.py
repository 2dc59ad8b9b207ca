"""Paged attention: against float64, and bit for bit against itself in other batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from moiety_kernels.cpu.library import load
from moiety_kernels.ops.paged_attention import paged_attention, store
from moiety_kernels.reference.attention import AttentionOptions, paged_attention_reference

# Largest error over the largest output: float32 sums, and in bfloat16 one rounding of the result. torch rounds the bfloat16
# attention weights as well.
BOUND = {"C++": {torch.float32: 2e-6, torch.bfloat16: 4e-3}, "torch": {torch.float32: 2e-6, torch.bfloat16: 1.2e-2}}

PLAIN: dict[str, Any] = {}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "window": {"window": 20},  # starts and ends inside blocks
    "chunk": {"chunk": 24},
    "sinks": {"sinks": True},
    "softcap": {"softcap": 3.0},  # scores up to 3 and more: both branches of the tanh
    "all at once": {"window": 50, "chunk": 128, "sinks": True, "softcap": 3.0},
    "bias by distance": {"biases": 40},  # shorter than most lengths: the last entry serves larger distances
    "bias and all": {"biases": 600, "window": 50, "sinks": True, "softcap": 3.0},
}
LENGTHS = {
    "decode of one": [(1, 130)],
    "the first token of a sequence": [(1, 1)],
    "decode of many, uneven": [(1, 5), (1, 16), (1, 17), (1, 64), (1, 65), (1, 200)],
    "a prefill": [(70, 70)],
    "a chunk of a prefill beside decodes": [(1, 33), (40, 100), (1, 9), (2, 2)],
    "past the end of a partial result": [(3, 1100), (1, 513)],
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Uses one thread: in these small cases, threads waiting for each other would take most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Case:
    """A filled pool with blocks out of order, and the other arguments of the operation."""

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    tables: torch.Tensor
    sequence: torch.Tensor
    length: torch.Tensor
    options: AttentionOptions

    def run(self) -> torch.Tensor:
        """Returns the result of the operation under test, [T, H, Dv]."""
        return paged_attention(
            self.query, self.keys, self.values, self.tables, self.sequence, self.length, self.options
        )

    def exact(self) -> torch.Tensor:
        """Returns the reference's result in float64."""
        sinks, bias = (None if part is None else part.double() for part in (self.options.sinks, self.options.bias))
        options = replace(self.options, sinks=sinks, bias=bias)
        pools = self.keys.double(), self.values.double()
        return paged_attention_reference(self.query.double(), *pools, self.tables, self.sequence, self.length, options)

    def only(self, tokens: list[int]) -> Case:
        """Returns the case with only these tokens."""
        return replace(self, query=self.query[tokens], sequence=self.sequence[tokens], length=self.length[tokens])


def make(
    counts: list[tuple[int, int]],
    dtype: torch.dtype,
    *,
    heads: int = 6,
    groups: int = 2,
    key_width: int = 24,
    value_width: int = 24,
    page: int = 16,
    shared: bool = False,
    sinks: bool = False,
    biases: int = 0,
    **options: Any,
) -> Case:
    """Makes a case for `counts` of (query tokens, length); positions and table entries not to be read are NaN or -1."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    blocks = sum(-(-length // page) for _, length in counts)
    keys = torch.full((blocks + 1, groups, page, key_width), float("nan"), dtype=dtype)
    values = keys[..., :value_width] if shared else keys.new_full((*keys.shape[:3], value_width), float("nan"))
    tables = torch.full((len(counts), max(-(-length // page) for _, length in counts) + 1), -1, dtype=torch.int32)
    free = torch.randperm(blocks, generator=generator).int() + 1
    for table, (_, length) in zip(tables, counts, strict=True):
        used = -(-length // page)
        table[:used], free = free[:used], free[used:]
        position = torch.arange(length)
        slots = table[position // page].long() * page + position % page
        value = None if shared else normal(groups, length, value_width).transpose(0, 1)
        store(keys, None if shared else values, normal(length, groups, key_width), value, slots)
    return Case(
        normal(heads, sum(count for count, _ in counts), key_width).transpose(0, 1),
        keys,
        values,
        tables,
        torch.tensor([row for row, (count, _) in enumerate(counts) for _ in range(count)], dtype=torch.int32),
        torch.tensor([end for n, length in counts for end in range(length - n + 1, length + 1)], dtype=torch.int32),
        AttentionOptions(
            scale=key_width**-0.5 * 2,
            sinks=normal(heads) * 2 if sinks else None,
            bias=torch.randn(heads, biases, generator=generator) * 2 if biases else None,
            **options,
        ),
    )


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Returns the largest error over the largest value."""
    return ((found.double() - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("counts", LENGTHS.values(), ids=LENGTHS)
def test_is_within_rounding_of_float64(
    kernels: str, counts: list[tuple[int, int]], variant: dict[str, Any], dtype: torch.dtype
):
    """Every kind of attention over every mix of sequences meets its bound, with NaN where nothing was stored."""
    case = make(counts, dtype, **variant)
    found = case.run()
    assert found.dtype == dtype
    assert error(found, case.exact()) <= BOUND[kernels][dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        {"heads": 4, "groups": 4, "key_width": 16, "value_width": 8},  # no grouped heads; narrower than one vector
        {"heads": 16, "groups": 1, "key_width": 576, "value_width": 512, "shared": True},  # the latent of MLA
        {
            "heads": 130,
            "groups": 1,
            "key_width": 40,
            "value_width": 32,
            "shared": True,
        },  # more heads than a unit of work holds
        {"heads": 5, "groups": 1, "key_width": 192, "value_width": 128},  # expanded MLA; an odd number of rows
        {"heads": 4, "groups": 2, "key_width": 80, "value_width": 80, "page": 5},  # blocks across tiles; odd tails
        {"heads": 2, "groups": 2, "key_width": 256, "value_width": 256, "page": 64},
        {"heads": 2, "groups": 1, "key_width": 9, "value_width": 7},  # no multiple of anything
    ],
    ids=str,
)
def test_takes_any_heads_widths_and_blocks(kernels: str, shape: dict[str, Any], dtype: torch.dtype):
    """Widths, head groups and block sizes of models, and unusual ones, meet the bound."""
    case = make([(1, 70), (9, 40)], dtype, **shape)
    assert error(case.run(), case.exact()) <= BOUND[kernels][dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_as_exact_as_torch(dtype: torch.dtype):
    """A prefill's error is at most 1.5 times that of torch's own fused attention."""
    case = make([(150, 150)], dtype, heads=2, groups=2, key_width=64, value_width=64)
    exact = case.exact()
    index = case.tables[0, : -(-150 // 16)].long()
    key, value = (pool[index].transpose(0, 1).flatten(1, 2)[:, :150] for pool in (case.keys, case.values))
    query, scale = case.query.transpose(0, 1), case.options.scale
    fused = functional.scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True, scale=scale)
    assert error(case.run(), exact) <= 1.5 * error(fused[0].transpose(0, 1), exact)


def test_float16_is_computed(kernels: str):
    """float16, which has no C++ kernel, is computed with torch."""
    case = make([(1, 70), (9, 40)], torch.float16, sinks=True)
    assert error(case.run(), case.exact()) <= 4e-3


@pytest.mark.skipif(load() is None, reason="only the C++ kernels guarantee this; torch agrees up to rounding")
@settings(deadline=None, max_examples=60)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    counts=st.lists(
        st.integers(1, 1200).flatmap(lambda length: st.tuples(st.integers(1, min(length, 80)), st.just(length))),
        min_size=1,
        max_size=6,
    ),
    heads=st.sampled_from([(2, 2), (6, 2), (16, 1)]),
    variant=st.sampled_from(list(VARIANTS.values())),
    threads=st.integers(1, 2),
    data=st.data(),
)
def test_a_token_does_not_depend_on_its_company(
    dtype: torch.dtype,
    counts: list[tuple[int, int]],
    heads: tuple[int, int],
    variant: dict[str, Any],
    threads: int,
    data: st.DataObject,
):
    """A token's bits do not depend on other tokens of its sequence, on other sequences, or on the threads."""
    case = make(counts, dtype, heads=heads[0], groups=heads[1], key_width=40, value_width=40, **variant)
    tokens = len(case.length)
    some = data.draw(st.lists(st.integers(0, tokens - 1), min_size=1, max_size=6))
    torch.set_num_threads(threads)
    together = case.run()
    torch.set_num_threads(1)
    assert torch.equal(case.only(some).run(), together[some])
    for token in some:
        assert torch.equal(case.only([token]).run()[0], together[token])


def test_store_writes_its_slots_and_no_others(kernels: str):
    """Keys and values of any stride are written to their slots, and nothing else changes."""
    keys, values = torch.zeros(3, 2, 4, 8), torch.zeros(3, 2, 4, 6)
    key, value = torch.randn(2, 5, 8).transpose(0, 1), torch.randn(5, 6, 2).transpose(1, 2)
    slots = torch.tensor([11, 0, 5, 4, 7])
    store(keys, values, key, value, slots)
    for pool, rows in ((keys, key), (values, value)):
        expected = torch.zeros_like(pool)
        for row, slot in zip(rows, slots.tolist(), strict=True):
            expected[slot // 4, :, slot % 4] = row
        assert torch.equal(pool, expected)


def test_wrong_index_types_are_refused(kernels: str):
    """Indices that are not int32 raise an error that names them, instead of reading past the pool."""
    case = make([(1, 3)], torch.float32)
    with pytest.raises(ValueError, match=r"length is torch\.int64"):
        replace(case, length=case.length.long()).run()
