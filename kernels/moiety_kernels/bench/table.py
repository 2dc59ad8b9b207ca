"""Measures the benchmark's table: one row per model, number of tokens, operation and implementation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import exp, log

import torch

from moiety_kernels.bench.clock import Ceilings, Clock
from moiety_kernels.bench.peers import Function, Work, grouped_mm, loop
from moiety_kernels.gpu.expert_mlp import ExpertOperands, moe, sorted_expert_mlp
from moiety_kernels.gpu.models import Model, experts_of
from moiety_kernels.gpu.permute import permute, sort_by_expert

Peers = Mapping[str, Callable[[Work], Function | None]]
OURS = "moiety"


@dataclass(frozen=True, slots=True)
class TableRow:
    """One implementation's time for one model and number of tokens: a row of the benchmark's table.

    `operation`: `block` is a whole MoE block after gating, `experts` only the experts' MLPs over sorted rows.
    """

    model: str
    tokens: int
    operation: str
    weights: str
    implementation: str
    us: float
    tflops: float
    gbytes: float  # GB/s: weights of active experts read once, rows read and written once
    of_matmul: float  # share of the measured best product
    of_copy: float  # share of the measured best copy
    graph: bool  # timed as a CUDA graph
    error: float  # largest difference from our output over the largest output

    def __str__(self) -> str:
        return (
            f"{self.model:24}{self.tokens:6} {self.operation:8}{self.weights:9}{self.implementation:12}{self.us:11.1f}"
            f"{self.tflops:9.1f}{self.gbytes:9.0f}{self.of_matmul:8.0%}{self.of_copy:8.0%}"
            f"{'' if self.graph else '  (no graph)'}{'  DIFFERS' if not self.error <= 0.05 else ''}"
        )


_NUMBERS = f"{'µs':>11}{'TFLOP/s':>9}{'GB/s':>9}{'matmul':>8}{'copy':>8}"
HEADER = f"{'model':24}{'tokens':>6} {'what':8}{'weights':9}{'by':12}{_NUMBERS}"


def work_of(model: Model, tokens: int, dtype: torch.dtype, experts: ExpertOperands, device: str) -> Work:
    """Returns random tokens as the input of a measurement; each token has K distinct experts, all equally likely.

    `rows` holds only the rows of experts on this device.
    """
    generator = torch.Generator(device=device).manual_seed(tokens)
    x = torch.randn(tokens, model.hidden, generator=generator, device=device).to(dtype)
    noise = torch.rand(tokens, model.choices, generator=generator, device=device)
    index = noise.topk(min(model.gate.top_k, model.choices), dim=1).indices
    index[0, 0] = torch.where((index[0] < model.experts).any(), index[0, 0], 0)  # at least one row on this device
    weights = torch.rand(index.shape, generator=generator, device=device)
    permutation = sort_by_expert(index, model.experts)
    local = int(permutation.offsets[-1])
    rows = permute(x, permutation, index.shape[1])[:local]
    expert_of = index.flatten()[permutation.order[:local].long()]
    return Work(x, index, weights, experts, rows, expert_of, permutation.offsets, model.choices)


def measure(
    model: Model, tokens: Sequence[int], clock: Clock, ceilings: Ceilings, dtype: torch.dtype, peers: Peers
) -> Iterator[TableRow]:
    """Yields one model's rows of the table.

    Plain weights are measured with this package's kernels and every peer, quantised weights only with this package's.
    """
    plain = experts_of(model, dtype, "plain", clock.device)
    for count in tokens:
        work = work_of(model, count, dtype, plain, clock.device)
        block = lambda work=work: moe(work.x, work.index, work.weights, work.experts)  # noqa: E731
        yield from _timed(model, work, "block", {OURS: block, **_prepared(peers, work)}, clock, ceilings)
        ours = lambda work=work: sorted_expert_mlp(work.rows, work.offsets, work.experts)  # noqa: E731
        functions = {OURS: ours, **_prepared({"grouped_mm": grouped_mm, "cuBLAS": loop}, work)}
        yield from _timed(model, work, "experts", functions, clock, ceilings)
        del work
    del plain
    quantised = experts_of(model, dtype, model.kind, clock.device)
    for count in tokens:
        work = work_of(model, count, dtype, quantised, clock.device)
        ours = lambda work=work: sorted_expert_mlp(work.rows, work.offsets, work.experts)  # noqa: E731
        yield from _timed(model, work, "experts", {OURS: ours}, clock, ceilings, model.kind)


def _prepared(peers: Peers, work: Work) -> dict[str, Function]:
    """Returns the functions of the peers that can compute `work`."""
    functions = {name: prepare(work) for name, prepare in peers.items()}
    return {name: function for name, function in functions.items() if function is not None}


def _timed(
    model: Model,
    work: Work,
    operation: str,
    functions: Mapping[str, Function],
    clock: Clock,
    ceilings: Ceilings,
    weights: str = "",
) -> Iterator[TableRow]:
    """Times each of `functions` and yields its row. The first function is this package's; errors are differences from it."""
    rows = len(work.rows)
    activated = int((work.offsets.diff() > 0).sum())
    moved = activated * (work.experts.gate_up.matrix_nbytes + work.experts.down.matrix_nbytes)
    moved += 2 * (work.x if operation == "block" else work.rows).nbytes
    expected: torch.Tensor | None = None
    for name, function in functions.items():
        out = function().float()
        expected = out if expected is None else expected
        error = ((out - expected).abs().max() / expected.abs().max()).item()
        seconds, graph = clock.seconds(function)
        yield TableRow(
            model.name,
            work.x.shape[0],
            operation,
            weights or str(work.x.dtype).removeprefix("torch."),
            name,
            seconds * 1e6,
            model.flops(rows) / seconds / 1e12,
            moved / seconds / 1e9,
            model.flops(rows) / seconds / ceilings.matmul,
            moved / seconds / ceilings.copy,
            graph,
            error,
        )


def summary(rows: Sequence[TableRow]) -> Iterator[str]:
    """Yields a line per peer: the peer's time over this package's, as geometric mean and at its least."""
    ours = {(r.model, r.tokens, r.operation, r.weights): r for r in rows if r.implementation == OURS}
    for name in dict.fromkeys(r.implementation for r in rows if r.implementation != OURS):
        ratios = {
            (r.model, r.tokens): r.us / ours[r.model, r.tokens, r.operation, r.weights].us
            for r in rows
            if r.implementation == name
        }
        (model, tokens), least = min(ratios.items(), key=lambda item: item[1])
        mean = exp(sum(map(log, ratios.values())) / len(ratios))
        yield f"against {name}: {mean:.2f}x as fast (geometric mean of {len(ratios)}), least {least:.2f}x: {model}, {tokens}"
