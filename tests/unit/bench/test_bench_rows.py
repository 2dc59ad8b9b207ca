"""Rows and verdicts of the benchmarks, from given runs."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from moiety.bench.engines.layer_times import LayerTime, SpanRecorder, layer_times
from moiety.bench.flood import FloodReport, FloodWork, Tally
from moiety.bench.flood import rows_of as flood_rows
from moiety.bench.serve.floor import StepCost
from moiety.bench.serve.rows import OUT_OF_TIME, Cell, Measured, row_lines, rows_of
from moiety.bench.serve.systems import Arrivals, SystemLoad
from moiety.bench.token_speeds import Speeds
from moiety.telemetry.names import Attribute, SpanName
from moiety.tools.machine_speed import MachineSpeed

COST = StepCost(router=1000, expert=100, moe_layers=2, experts=8, top_k=2)
SPEED = MachineSpeed(read_bytes_per_s=1e6, bfloat16_flops=1e9, float32_flops=1e9)
CELL = Cell(prompt_tokens=64, streams=8)


@dataclass
class _System:
    """A System with a name that is a peer or not; it is never run."""

    name: str
    peer: bool
    expert_width: float | None = None

    async def start(self, load: SystemLoad, timeout_s: float) -> None: ...

    async def run(self, prompts: object, new_tokens: int, timeout_s: float) -> Arrivals:
        raise AssertionError

    async def stop(self) -> None: ...


def _speeds(decode: float, prefill: float) -> Speeds:
    return Speeds(decode, itl_p50_ms=8000 / decode, itl_p99_ms=1.0, ttft_p50_ms=1.0, prefill_tokens_per_s=prefill)


def test_ratios_to_the_best_peer() -> None:
    """Ratios are to the best peer of each kind of speed, for that peer too; Moiety itself is not a peer."""
    measured = [
        Measured(_System("moiety", False), {CELL: [_speeds(100, 900), _speeds(120, 1000), _speeds(1, 1)]}),
        Measured(_System("fast decode", True), {CELL: [_speeds(200, 500)]}),
        Measured(_System("fast prefill", True), {CELL: [_speeds(50, 2000)]}),
    ]
    served, decode, prefill = rows_of("m", COST, SPEED, "bfloat16", measured)
    assert (served.decode_tokens_per_s, served.prefill_tokens_per_s, served.rounds) == (100, 900, 3)
    assert (served.ratio_to_best_peer, served.prefill_ratio_to_best_peer) == (0.5, 0.45)
    assert (decode.ratio_to_best_peer, decode.prefill_ratio_to_best_peer) == (1, 0.25)
    assert (prefill.ratio_to_best_peer, prefill.prefill_ratio_to_best_peer) == (0.25, 1)
    assert served.step_over_floor == pytest.approx(80 / (1000 * COST.floor_s(8, SPEED, "bfloat16")))


def test_rows_of_what_was_not_measured() -> None:
    """A failed system keeps its measured rows; the rows it never reached say why; other rows are unchanged."""
    other = Cell(512, 8)
    measured = [
        Measured(_System("moiety", False), {CELL: [_speeds(100, 900)], other: [_speeds(90, 800)]}),
        Measured(_System("broken", True), {CELL: [_speeds(10, 90)]}, failed="it died"),
        Measured(_System("slow", True), {CELL: [_speeds(20, 90)]}),
    ]
    rows = list(rows_of("m", COST, SPEED, "bfloat16", measured))
    assert [(row.prompt_tokens, row.system, row.failed) for row in rows] == [
        (64, "moiety", None),
        (64, "broken", "it died"),
        (64, "slow", None),
        (512, "moiety", None),
        (512, "broken", "it died"),
        (512, "slow", OUT_OF_TIME),
    ]
    assert rows[1].decode_tokens_per_s == 10
    assert rows[4].decode_tokens_per_s is None
    assert rows[3].ratio_to_best_peer is None
    assert "FAILED: broken (m): it died" in list(row_lines(rows))


def _flood(paces: dict[int, float], *, hints: int = 5) -> FloodReport:
    work = FloodWork("small", 2, 8, 8, (1, 2), 1.0, 8, 8, "float32", 1)
    runs = {
        load: [Tally(accepted=9, refused=5, refused_with_hint=hints, tokens_per_s=pace)] for load, pace in paces.items()
    }
    return FloodReport(work, flood_rows(work, runs, {load: [1.0] for load in paces}))


def test_flood_verdict() -> None:
    """Only loads beyond the capacity must keep the pace; a refusal without a retry delay fails at any load."""
    assert [row.ratio_to_peak for row in _flood({0: 100, 1: 80, 2: 96}).rows] == [1, 0.8, 0.96]
    assert _flood({0: 100, 1: 80, 2: 96}).passed
    assert not _flood({0: 100, 1: 100, 2: 94}).passed
    assert not _flood({0: 100, 1: 100, 2: 100}, hints=4).passed


def test_layer_times() -> None:
    """Compute is the slowest group's, the hop is the rest, and a group without a call counts as idle."""
    recorder = SpanRecorder()
    for step_class in ("decode", "prefill"):
        step = recorder.start(SpanName.STEP, parent=recorder.root(), attributes={Attribute.STEP_CLASS: step_class})
        layer = recorder.start(SpanName.LAYER, parent=step)
        for start_ms, end_ms, compute_ms in ((0, 5, 3.0), (1, 6, 1.0)):
            hop = recorder.start(SpanName.HOP, parent=layer, start_ns=10**9 + start_ms * 10**6)
            hop.set(Attribute.COMPUTE_MS, compute_ms)
            hop.end(10**9 + end_ms * 10**6)
    assert layer_times(recorder.spans, groups=4) == [LayerTime(compute_ms=3.0, hop_ms=3.0, imbalance=3.0)]
    assert not recorder.start(SpanName.STEP, parent=None).recording
