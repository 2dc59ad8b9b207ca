"""Tiny checkpoints, opened once, and an ExpertBackend that computes in this process from slices of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from moiety.core.expert_backend import PendingRows
from moiety.core.experts import ExpertMLP, ExpertSet
from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.experts.layout import ExpertLayout
from moiety.model.experts.read import load_experts
from moiety_kernels import ExpertWeights, grouped_expert_mlp
from moiety_kernels.cpu.library import SWITCH, load

Held = dict[tuple[int, int], ExpertWeights]
MakeExperts = Callable[..., "LocalExperts"]


class Rows:
    """Rows that are already there."""

    def __init__(self, rows: torch.Tensor) -> None:
        self._rows = rows

    def result(self) -> torch.Tensor:
        return self._rows


class LocalExperts:
    """Stands where the hop stands: each slice computes the rows of the experts it holds, and nobody else does."""

    def __init__(self, mlp: ExpertMLP, slices: Sequence[Held]) -> None:
        self._options = {
            "activation": mlp.activation,
            "gated": mlp.gated,
            "interleaved": mlp.interleaved,
            "limit": mlp.limit,
            "alpha": mlp.alpha,
        }
        self._slices = slices
        self.tokens: list[int] = []  # T of every call, in order

    def submit(self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor) -> PendingRows:
        self.tokens.append(hidden.shape[0])
        flat, top_k = top_k_index.reshape(-1), top_k_index.shape[1]
        out = torch.full((flat.numel(), hidden.shape[1]), torch.nan, dtype=hidden.dtype)
        out[flat < 0] = 0.0
        for held in self._slices:
            experts = sorted(expert for held_layer, expert in held if held_layer == layer)
            slots = [(flat == expert).nonzero().squeeze(1) for expert in experts]
            order = torch.cat(slots)
            rows, counts = hidden[order // top_k], [len(slot) for slot in slots]
            out[order] = grouped_expert_mlp(rows, counts, [held[layer, e] for e in experts], **self._options)
        out[flat < 0] = 0  # no expert
        return Rows(out.view(*top_k_index.shape, -1))

    def replace(self, layer: int, expert: int, *, by: tuple[int, int]) -> None:
        """From now on (layer, expert) computes with the weights of the pair `by`, which the same slice must hold."""
        held = next(held for held in self._slices if (layer, expert) in held)
        held[layer, expert] = held[by]

    def held_bytes(self) -> list[tuple[int, int]]:
        """Per slice: how many experts, and the bytes their storages keep alive."""
        return [(len(held), sum(weights.nbytes for weights in held.values())) for held in self._slices]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices of 64 columns gain nothing from threads that other tests may be using."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="package", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Layouts are cached in a folder of these tests only."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("MOIETY_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="package", autouse=True)
def torch_kernels() -> Iterator[None]:
    """Torch computes: its sums have the order of transformers', so that what is read and routed can be compared to the bit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SWITCH, "off")
        load.cache_clear()
        yield
    load.cache_clear()


@pytest.fixture(scope="session")
def make_experts() -> MakeExperts:
    """(checkpoint, layout, dtype) -> LocalExperts over two uneven slices: the first 3 experts, and the others."""

    def make(checkpoint: Checkpoint, layout: ExpertLayout, dtype: torch.dtype = torch.float32) -> LocalExperts:
        shape = layout.shape
        parts = (range(3), range(3, shape.experts))
        sets = [ExpertSet.block(shape.moe_layers, part) for part in parts]
        return LocalExperts(shape.mlp, [load_experts(checkpoint, layout, held, dtype) for held in sets])

    return make
