"""`moiety bench experts`: compares the speed of the expert kernels with plain torch and with the machine's limits.

Decode is compared with the machine's read bandwidth, prefill with its matmul rate. A cost model is fitted to the times.

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
DECODE_ROWS = 8  # rows per expert up to which reading weights is the bottleneck; beyond, the products are
CACHES = 3  # weights of a call, as a multiple of the last-level cache, so that the cache holds little of them
LEAST_BYTES = 64 << 20
PREFILL_EXPERTS = 8  # where products are the bottleneck, more experts would only take longer
REPEATS = 7
SLICE_S = 0.6  # a measurement starts no further round after this many seconds per system, but runs at least two


@dataclass(frozen=True, slots=True)
class ExpertsRow:
    """Times of one call: E experts with R rows each. Each time is that of the fastest of several runs."""

    dtype: str
    experts: int
    rows: int  # per expert
    nbytes: int  # of weights, streamed once
    seconds: float
    eager_s: float  # torch, one expert after the other; with bfloat16 weights where ours are quantised
    grouped_s: float | None  # torch._grouped_mm; None where it does not support the dtype

    @property
    def best_torch_s(self) -> float:
        return self.eager_s if self.grouped_s is None else min(self.eager_s, self.grouped_s)


@dataclass(frozen=True, slots=True)
class KernelCost:
    """Cost of a call: seconds = a_s + b_s_per_byte * activated weight bytes + c_s_per_row * rows.

    Fitted by relative least squares to the measured calls of one dtype.
    """

    dtype: str
    a_s: float
    b_s_per_byte: float
    c_s_per_row: float
    worst: float  # largest relative error of a measured point

    def seconds(self, nbytes: int, rows: int) -> float:
        """Predicts the seconds of a call with `nbytes` of activated weights and `rows` rows in all."""
        return self.a_s + self.b_s_per_byte * nbytes + self.c_s_per_row * rows


@dataclass(frozen=True, slots=True)
class ExpertsReport:
    """All rows, the cost model of each dtype, and the machine's speed during the run."""

    hidden: int
    intermediate: int
    threads: int
    rows: tuple[ExpertsRow, ...]
    costs: tuple[KernelCost, ...]
    speed: MachineSpeed

    def flops(self, row: ExpertsRow) -> float:
        """Returns the operations per second that the call of `row` reached, counting the gate, up and down products."""
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
    """Measures the expert kernels and plain torch in about a minute. Needs several times the last-level cache in memory."""
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
            dtype_rows = []
            for count in rows:
                experts = weights if count <= DECODE_ROWS else weights[:PREFILL_EXPERTS]
                progress(f"{dtype}: {len(experts)} experts, {count} rows each")
                dtype_rows.append(_measure(dtype, experts, count))
            measured += dtype_rows
            fewer_experts = [
                _measure(dtype, weights[:number], 1, alone=True) for number in (len(weights) // 4, len(weights) // 2)
            ]
            costs.append(_fit(dtype, [*fewer_experts, *dtype_rows]))
            del weights
    finally:
        torch.set_num_threads(before)
    return ExpertsReport(hidden, intermediate, threads, tuple(measured), tuple(costs), speed)


def _weights(dtype: str, hidden: int, intermediate: int) -> list[ExpertWeights]:
    """Returns random experts: at least LEAST_BYTES in all, and at least CACHES times the last-level cache if known."""
    torch_dtype = torch.float32 if dtype == "float32" else torch.bfloat16

    def one(seed: int) -> ExpertWeights:
        generator = torch.Generator().manual_seed(seed)
        gate_up = torch.empty(2 * intermediate, hidden, dtype=torch_dtype).normal_(0, 0.02, generator=generator)
        down = torch.empty(hidden, intermediate, dtype=torch_dtype).normal_(0, 0.02, generator=generator)
        expert = ExpertWeights(gate_up, down)
        return expert.quantised(int(dtype.removeprefix("int"))) if dtype.startswith("int") else expert

    size = one(0).nbytes
    needed = max(CACHES * (last_level_cache_bytes() or 0), LEAST_BYTES)
    return [one(seed) for seed in range(max(8, math.ceil(needed / size)))]


def _measure(dtype: str, weights: Sequence[ExpertWeights], count: int, *, alone: bool = False) -> ExpertsRow:
    """Measures a call with `count` rows for each expert of `weights`; with `alone`, only Moiety's kernel, not plain torch."""
    torch_dtype = torch.float32 if dtype == "float32" else torch.bfloat16
    hidden = weights[0].form[0]
    rows = torch.randn(len(weights) * count, hidden, generator=torch.Generator().manual_seed(0)).to(torch_dtype)
    counts = [count] * len(weights)
    calls: dict[str, Callable[[], object]] = {"ours": partial(grouped_expert_mlp, rows, counts, weights)}
    if not alone:
        plain = [expert.dequantised(torch_dtype) for expert in weights]
        calls["eager"] = partial(_eager, rows, count, plain)
        stacked = _stacked(plain)
        offsets = torch.arange(1, len(weights) + 1, dtype=torch.int32) * count
        calls["grouped"] = partial(_grouped, rows, offsets, *stacked)
        try:
            calls["grouped"]()
        except (RuntimeError, ValueError):  # does not support this dtype or this CPU
            del calls["grouped"]
    times = _in_turns(calls)
    nbytes = sum(expert.nbytes for expert in weights)
    return ExpertsRow(
        dtype, len(weights), count, nbytes, times["ours"], times.get("eager", math.inf), times.get("grouped")
    )


def _in_turns(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Runs the calls in turns, REPEATS rounds or fewer if they are slow. Returns the least seconds of each call."""
    least = dict.fromkeys(calls, math.inf)
    spent = 0.0
    for repeat in range(REPEATS + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            took = time.perf_counter() - began
            spent += took
            if repeat:  # the first round warms up caches, threads and allocators
                least[name] = min(least[name], took)
        if repeat and spent > SLICE_S * len(calls):
            break
    return least


@torch.inference_mode()
def _eager(rows: torch.Tensor, count: int, weights: Sequence[ExpertWeights]) -> torch.Tensor:
    """Computes one expert after the other with two linear layers, as transformers' eager experts do."""
    out = torch.empty_like(rows)
    for place, expert in enumerate(weights):
        span = slice(place * count, (place + 1) * count)
        inner = activate(torch.nn.functional.linear(rows[span], expert.gate_up))  # type: ignore[arg-type]
        out[span] = torch.nn.functional.linear(inner, expert.down)  # type: ignore[arg-type]
    return out


def _stacked(weights: Sequence[ExpertWeights]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns gate and up [E, D, 2 I] and down [E, I, D], as transposed views: the form that torch._grouped_mm takes."""
    gate_up = torch.stack([expert.gate_up for expert in weights])  # type: ignore[misc]
    return gate_up.transpose(1, 2), torch.stack([expert.down for expert in weights]).transpose(1, 2)  # type: ignore[misc]


@torch.inference_mode()
def _grouped(rows: torch.Tensor, offsets: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Computes the experts as transformers' grouped_mm experts do."""
    inner = activate(torch._grouped_mm(rows, gate_up, offs=offsets))
    return torch._grouped_mm(inner, down, offs=offsets)


def _fit(dtype: str, rows: Sequence[ExpertsRow]) -> KernelCost:
    """Fits the cost model by least squares of the relative errors, with the condition that no cost is negative."""
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
    return KernelCost(dtype, a_s, b_s_per_byte, c_s_per_row, worst)


def experts_lines(report: ExpertsReport) -> Iterator[str]:
    """Yields the lines of the report: the machine's speeds, a table with one line per call, and the cost models."""
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
