"""Computes the rows of `moiety bench serve` from its runs: medians, ratios to the best peer, step time over the floor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace

from moiety.bench.report import table
from moiety.bench.serve.floor import StepCost
from moiety.bench.serve.systems import System
from moiety.bench.token_speeds import Speeds, median
from moiety.tools.machine_speed import MachineSpeed

OUT_OF_TIME = "not measured: out of time"


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of the comparison's grid: `streams` prompts of `prompt_tokens` tokens, all at once."""

    prompt_tokens: int
    streams: int


@dataclass(slots=True)
class Measured:
    """A system, and the speeds of its runs so far in each cell."""

    system: System
    runs: dict[Cell, list[Speeds]] = field(default_factory=dict)
    failed: str | None = None  # the error after which the system was not run again


@dataclass(frozen=True, slots=True)
class ServeRow:
    """Medians of one system's runs in one cell. Without a run they are None, and `failed` says why."""

    model: str
    prompt_tokens: int
    concurrency: int
    system: str
    decode_tokens_per_s: float | None = None
    itl_p50_ms: float | None = None
    itl_p99_ms: float | None = None
    ttft_p50_ms: float | None = None
    prefill_tokens_per_s: float | None = None
    ratio_to_best_peer: float | None = None  # of decode tokens/s; None where no peer ran
    prefill_ratio_to_best_peer: float | None = None
    floor_ms: float | None = None  # of a decode step on this machine
    step_over_floor: float | None = None
    rounds: int = 0
    failed: str | None = None


def rows_of(
    model: str, cost: StepCost, speed: MachineSpeed, dtype: str, measured: Sequence[Measured]
) -> Iterator[ServeRow]:
    """Yields one row per system for each cell that at least one system has run."""
    cells = dict.fromkeys(cell for one in measured for cell in one.runs)
    for cell in cells:
        medians = [median(one.runs[cell]) if cell in one.runs else None for one in measured]
        peers = [
            speeds for one, speeds in zip(measured, medians, strict=True) if speeds is not None and one.system.peer
        ]
        best_decode = max((speeds.decode_tokens_per_s for speeds in peers), default=0.0)
        best_prefill = max((speeds.prefill_tokens_per_s for speeds in peers), default=0.0)
        for one, speeds in zip(measured, medians, strict=True):
            floor_ms = 1000 * cost.floor_s(cell.streams, speed, dtype, one.system.expert_width)
            row = ServeRow(
                model, cell.prompt_tokens, cell.streams, one.system.name, floor_ms=floor_ms, failed=one.failed
            )
            if speeds is None:
                yield replace(row, failed=one.failed or OUT_OF_TIME)
                continue
            yield replace(
                row,
                **asdict(speeds),
                ratio_to_best_peer=speeds.decode_tokens_per_s / best_decode if best_decode else None,
                prefill_ratio_to_best_peer=speeds.prefill_tokens_per_s / best_prefill if best_prefill else None,
                step_over_floor=speeds.itl_p50_ms / floor_ms,
                rounds=len(one.runs[cell]),
            )


def row_lines(rows: Sequence[ServeRow]) -> Iterator[str]:
    """Yields the lines of one table per model, then one line for each failure of a system on a model."""
    header = (
        *("prompt", "streams", "system", "decode tok/s", "ITL p50", "ITL p99", "TTFT p50", "prefill tok/s"),
        *("ratio", "prefill ratio", "floor", "step/floor"),
    )
    for model in dict.fromkeys(row.model for row in rows):
        yield model
        yield from table(header, [_cells(row) for row in rows if row.model == model])
    for failure in dict.fromkeys(f"{row.system} ({row.model}): {row.failed}" for row in rows if row.failed):
        yield f"FAILED: {failure}"


def _cells(row: ServeRow) -> tuple[str, ...]:
    def shown(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    return (
        str(row.prompt_tokens),
        str(row.concurrency),
        row.system,
        shown(row.decode_tokens_per_s, 1),
        shown(row.itl_p50_ms, 1),
        shown(row.itl_p99_ms, 1),
        shown(row.ttft_p50_ms, 0),
        shown(row.prefill_tokens_per_s, 0),
        shown(row.ratio_to_best_peer, 2),
        shown(row.prefill_ratio_to_best_peer, 2),
        shown(row.floor_ms, 1),
        shown(row.step_over_floor, 2),
    )
