"""How fast experts are computed here: weights streamed in decode against the machine's read bandwidth, products in prefill
against its matmul rate, beside plain torch; and the cost model that follows from it.

Legend: R rows per expert, E activated experts, D hidden size, I intermediate size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import torch

from moiety.tools.machine import last_level_cache_bytes
from moiety.tools.machine_speed import MachineSpeed, measure_speed
from moiety_kernels import ExpertWeights, activate, grouped_expert_mlp
from moiety_kernels.threads import usable_cores

DTYPES = ("bfloat16", "float32", "int8", "int4")
DECODE_ROWS = 8  # up to here weights bind, beyond products do
CACHES = 3  # weights of a call are this many times the last-level cache, so that it holds little of them
LEAST_BYTES = 64 << 20
PREFILL_EXPERTS = 8  # where products bind, more would only take longer
REPEATS = 7
SLICE_S = 0.6  # at most for one thing measured, after its first two runs


@dataclass(frozen=True, slots=True)
class ExpertsRow:
    """One call: E experts with R rows each. Seconds are the least of several runs, the systems taking turns."""

    dtype: str
    experts: int
    rows: int  # per expert
    nbytes: int  # of weights, streamed once
    seconds: float
    eager_s: float  # torch, one expert after the other; of bfloat16 weights where ours are quantised
    grouped_s: float | None  # torch._grouped_mm, where it takes the dtype

    @property
    def best_torch_s(self) -> float:
        return self.eager_s if self.grouped_s is None else min(self.eager_s, self.grouped_s)


@dataclass(frozen=True, slots=True)
class CostModel:
    """seconds = a_s + b_s_per_byte * activated weight bytes + c_s_per_row * rows, in relative least squares."""

    dtype: str
    a_s: float
    b_s_per_byte: float
    c_s_per_row: float
    worst: float  # relative error of a measured point

    def seconds(self, nbytes: int, rows: int) -> float:
        """What the model predicts."""
        return self.a_s + self.b_s_per_byte * nbytes + self.c_s_per_row * rows


@dataclass(frozen=True, slots=True)
class ExpertsReport:
    """All rows, the cost model of each dtype, and the machine's own speed at that time."""

    hidden: int
    intermediate: int
    threads: int
    rows: tuple[ExpertsRow, ...]
    costs: tuple[CostModel, ...]
    speed: MachineSpeed

    def flops(self, row: ExpertsRow) -> float:
        """Per second, of gate, up and down."""
        return 6.0 * row.rows * row.experts * self.hidden * self.intermediate / row.seconds


def bench_experts(
    *,
    hidden: int = 1024,
    intermediate: int = 512,
    rows: Sequence[int] = (1, 2, 4, 8, 32, 256),
    dtypes: Sequence[str] = DTYPES,
    threads: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> ExpertsReport:
    """Takes a minute or so, and memory of a few times the last-level cache."""
    before = torch.get_num_threads()
    threads = threads or usable_cores()
    progress("the machine: read bandwidth and matmul rate")
    speed = measure_speed()
    torch.set_num_threads(threads)
    measured: list[ExpertsRow] = []
    costs = []
    try:
        for dtype in dtypes:
            weights = _weights(dtype, hidden, intermediate)
            of_dtype = []
            for count in rows:
                some = weights if count <= DECODE_ROWS else weights[:PREFILL_EXPERTS]
                progress(f"{dtype}: {len(some)} experts, {count} rows each")
                of_dtype.append(_measure(dtype, some, count))
            measured += of_dtype
            fewer = [
                _measure(dtype, weights[:number], 1, alone=True) for number in (len(weights) // 4, len(weights) // 2)
            ]
            costs.append(_fit(dtype, [*fewer, *of_dtype]))
            del weights
    finally:
        torch.set_num_threads(before)
    return ExpertsReport(hidden, intermediate, threads, tuple(measured), tuple(costs), speed)


def _weights(dtype: str, hidden: int, intermediate: int) -> list[ExpertWeights]:
    """So many experts that little of them stays in a cache."""
    kind = torch.float32 if dtype == "float32" else torch.bfloat16

    def one(seed: int) -> ExpertWeights:
        generator = torch.Generator().manual_seed(seed)
        gate_up = torch.empty(2 * intermediate, hidden, dtype=kind).normal_(0, 0.02, generator=generator)
        down = torch.empty(hidden, intermediate, dtype=kind).normal_(0, 0.02, generator=generator)
        expert = ExpertWeights(gate_up, down)
        return expert.quantised(int(dtype.removeprefix("int"))) if dtype.startswith("int") else expert

    size = one(0).nbytes
    needed = max(CACHES * (last_level_cache_bytes() or 0), LEAST_BYTES)
    return [one(seed) for seed in range(max(8, math.ceil(needed / size)))]


def _measure(dtype: str, weights: Sequence[ExpertWeights], count: int, *, alone: bool = False) -> ExpertsRow:
    kind = torch.float32 if dtype == "float32" else torch.bfloat16
    hidden = weights[0].form[0]
    rows = torch.randn(len(weights) * count, hidden, generator=torch.Generator().manual_seed(0)).to(kind)
    counts = [count] * len(weights)
    calls: dict[str, Callable[[], object]] = {"ours": partial(grouped_expert_mlp, rows, counts, weights)}
    if not alone:
        plain = [expert.dequantised(kind) for expert in weights]
        calls["eager"] = partial(_eager, rows, count, plain)
        stacked = _stacked(plain)
        offsets = torch.arange(1, len(weights) + 1, dtype=torch.int32) * count
        calls["grouped"] = partial(_grouped, rows, offsets, *stacked)
        try:
            calls["grouped"]()
        except (RuntimeError, ValueError):  # not of this dtype, not on this CPU
            del calls["grouped"]
    times = _in_turns(calls)
    nbytes = sum(expert.nbytes for expert in weights)
    return ExpertsRow(
        dtype, len(weights), count, nbytes, times["ours"], times.get("eager", math.inf), times.get("grouped")
    )


def _in_turns(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Least seconds of each of REPEATS rounds, of fewer where one is slow."""
    least = dict.fromkeys(calls, math.inf)
    spent = 0.0
    for repeat in range(REPEATS + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            took = time.perf_counter() - began
            spent += took
            if repeat:  # the first round warms caches, threads and allocators up
                least[name] = min(least[name], took)
        if repeat and spent > SLICE_S * len(calls):
            break
    return least


@torch.inference_mode()
def _eager(rows: torch.Tensor, count: int, weights: Sequence[ExpertWeights]) -> torch.Tensor:
    """As transformers' eager experts: a loop of two linear layers."""
    out = torch.empty_like(rows)
    for place, expert in enumerate(weights):
        span = slice(place * count, (place + 1) * count)
        inner = activate(torch.nn.functional.linear(rows[span], expert.gate_up))  # type: ignore[arg-type]
        out[span] = torch.nn.functional.linear(inner, expert.down)  # type: ignore[arg-type]
    return out


def _stacked(weights: Sequence[ExpertWeights]) -> tuple[torch.Tensor, torch.Tensor]:
    """[E, O, D] and [E, D, I], transposed views of which torch._grouped_mm takes."""
    gate_up = torch.stack([expert.gate_up for expert in weights])  # type: ignore[misc]
    return gate_up.transpose(1, 2), torch.stack([expert.down for expert in weights]).transpose(1, 2)  # type: ignore[misc]


@torch.inference_mode()
def _grouped(rows: torch.Tensor, offsets: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """As transformers' grouped_mm experts."""
    inner = activate(torch._grouped_mm(rows, gate_up, offs=offsets))
    return torch._grouped_mm(inner, down, offs=offsets)


def _fit(dtype: str, rows: Sequence[ExpertsRow]) -> CostModel:
    """Relative least squares with no negative cost: the best of the fits with some of them zero."""
    seconds = torch.tensor([row.seconds for row in rows], dtype=torch.float64)
    columns = torch.tensor([[1.0, row.nbytes, row.rows * row.experts] for row in rows], dtype=torch.float64)
    scaled = columns / seconds[:, None]
    best, least = torch.zeros(3, dtype=torch.float64), math.inf
    for size in (1, 2, 3):
        for chosen in combinations(range(3), size):
            unit = scaled[:, list(chosen)].norm(dim=0)  # bytes and seconds differ by powers of ten
            found = torch.linalg.lstsq(scaled[:, list(chosen)] / unit, torch.ones(len(rows), 1, dtype=torch.float64))
            costs = torch.zeros(3, dtype=torch.float64)
            costs[list(chosen)] = found.solution[:, 0] / unit
            error = float((scaled @ costs - 1).square().sum())
            if bool((costs >= 0).all()) and error < least:
                best, least = costs, error
    worst = float((scaled @ best - 1).abs().max())
    a_s, b_s_per_byte, c_s_per_row = best.tolist()
    return CostModel(dtype, a_s, b_s_per_byte, c_s_per_row, worst)


def experts_lines(report: ExpertsReport) -> Iterator[str]:
    """The table for people; the last lines are the cost model."""
    speed = report.speed
    yield (
        f"experts of hidden {report.hidden}, intermediate {report.intermediate}; {report.threads} threads; this machine reads "
        f"{speed.read_bytes_per_s / 1e9:.1f} GB/s and multiplies {speed.bfloat16_flops / 1e9:.0f} GFLOP/s in bfloat16, "
        f"{speed.float32_flops / 1e9:.0f} in float32"
    )
    yield (
        f"{'dtype':<9} {'experts x rows':>14} {'ms':>8} {'GB/s':>7} {'of read':>8} {'GFLOP/s':>8} {'of matmul':>9} "
        f"{'eager ms':>9} {'grouped ms':>10} {'best torch':>10}"
    )
    for row in report.rows:
        rate, flops = row.nbytes / row.seconds, report.flops(row)
        matmul = speed.flops("float32" if row.dtype == "float32" else "bfloat16")
        grouped = "-" if row.grouped_s is None else f"{1000 * row.grouped_s:.2f}"
        yield (
            f"{row.dtype:<9} {f'{row.experts} x {row.rows}':>14} {1000 * row.seconds:>8.2f} {rate / 1e9:>7.1f} "
            f"{rate / speed.read_bytes_per_s:>7.0%} {flops / 1e9:>8.0f} {flops / matmul:>9.0%} "
            f"{1000 * row.eager_s:>9.2f} {grouped:>10} {row.best_torch_s / row.seconds:>9.2f}x"
        )
    for cost in report.costs:
        rate = 1 / cost.b_s_per_byte / 1e9 if cost.b_s_per_byte else math.inf
        yield (
            f"{cost.dtype:<9} t = {1e6 * cost.a_s:.0f} us + bytes / {rate:.1f} GB/s + {1e6 * cost.c_s_per_row:.2f} us per row"
            f"   (within {cost.worst:.0%})"
        )
