"""Fixtures: tiny checkpoints, opened once, and an ExpertBackend that computes their experts in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from moiety.core.expert_backend import ComputedRows
from moiety.core.experts import ExpertMLP, ExpertSet
from moiety.model.activation import activation_of
from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.experts.cached import expert_layout
from moiety.model.experts.layout import ExpertLayout
from moiety.model.experts.read import load_experts
from moiety.synthetic import write_tiny
from moiety_kernels import ExpertWeights, grouped_expert_mlp
from moiety_kernels.cpu.library import SWITCH, load

OpenTiny = Callable[[str], tuple[Checkpoint, ExpertLayout]]
Held = dict[tuple[int, int], ExpertWeights]
MakeExperts = Callable[..., "LocalExperts"]


class LocalExperts:
    """Stands in for the hop: each slice computes the rows of the experts that it holds, and no others."""

    def __init__(self, mlp: ExpertMLP, slices: Sequence[Held]) -> None:
        self._activation, self._slices = activation_of(mlp), slices
        self.tokens: list[int] = []  # T of every call, in order

    def submit(self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor) -> ComputedRows:
        self.tokens.append(hidden.shape[0])
        flat, top_k = top_k_index.reshape(-1), top_k_index.shape[1]
        out = torch.full((flat.numel(), hidden.shape[1]), torch.nan, dtype=hidden.dtype)
        out[flat < 0] = 0.0
        for held in self._slices:
            experts = sorted(expert for held_layer, expert in held if held_layer == layer)
            slots = [(flat == expert).nonzero().squeeze(1) for expert in experts]
            order = torch.cat(slots)
            rows, counts = hidden[order // top_k], [len(slot) for slot in slots]
            out[order] = grouped_expert_mlp(rows, counts, [held[layer, e] for e in experts], self._activation)
        out[flat < 0] = 0  # no expert
        return ComputedRows(out.view(*top_k_index.shape, -1))

    def replace(self, layer: int, expert: int, *, by: tuple[int, int]) -> None:
        """Makes (layer, expert) compute with the weights of the pair `by` from now on; the same slice must hold both."""
        held = next(held for held in self._slices if (layer, expert) in held)
        held[layer, expert] = held[by]

    def held_bytes(self) -> list[tuple[int, int]]:
        """Returns per slice: the number of experts, and the bytes that their storages take."""
        return [(len(held), sum(weights.nbytes for weights in held.values())) for held in self._slices]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Limits torch to one thread: matrices of 64 columns gain nothing from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="package", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Caches layouts in a folder of these tests only."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("MOIETY_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="package", autouse=True)
def torch_kernels() -> Iterator[None]:
    """Makes torch compute the experts: it sums in transformers' order, so that results can be compared bit for bit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SWITCH, "off")
        load.cache_clear()
        yield
    load.cache_clear()


@pytest.fixture(scope="session")
def open_tiny(tmp_path_factory: pytest.TempPathFactory) -> OpenTiny:
    """Opens an architecture's tiny checkpoint and layout; writes the checkpoint on first use."""
    opened: dict[str, tuple[Checkpoint, ExpertLayout]] = {}

    def open_one(architecture: str) -> tuple[Checkpoint, ExpertLayout]:
        if architecture not in opened:
            folder = tmp_path_factory.mktemp(architecture)
            checkpoint = Checkpoint.open(write_tiny(architecture, folder, shard_bytes=200_000))
            opened[architecture] = checkpoint, expert_layout(checkpoint)
        return opened[architecture]

    return open_one


@pytest.fixture(scope="session")
def make_experts() -> MakeExperts:
    """Makes LocalExperts from (checkpoint, layout, dtype), in two uneven slices: the first 3 experts, and the others."""

    def make(checkpoint: Checkpoint, layout: ExpertLayout, dtype: torch.dtype = torch.float32) -> LocalExperts:
        shape = layout.shape
        parts = (range(3), range(3, shape.experts))
        sets = [ExpertSet.uniform(shape.moe_layers, part) for part in parts]
        return LocalExperts(shape.mlp, [load_experts(checkpoint, layout, held, dtype) for held in sets])

    return make
