"""Searches for the fastest tiles for each line of TABLE in `moiety_kernels.gpu.tiles`, and yields that table as source."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from math import exp, log

import torch

from moiety_kernels.bench.clock import Clock
from moiety_kernels.bench.table import work_of
from moiety_kernels.gpu.decode import decode_gemm
from moiety_kernels.gpu.grouped_gemm import grouped_gemm
from moiety_kernels.gpu.models import Model, experts_of
from moiety_kernels.gpu.tiles import DECODE_ROWS, SHARED, TABLE, Tile


def candidates(gated: bool, largest: int | None) -> Iterator[Tile]:
    """Yields tiles to try for experts of up to `largest` rows (None: any) that should fit registers and shared memory."""
    small = largest is not None and largest <= DECODE_ROWS
    heights = (largest,) if largest is not None and small else (64, 128)
    widths = (16, 32, 64) if small else (64, 128, 256)
    depths, counts = ((64, 128, 256), (3, 5)) if small else ((64,), (3, 4))
    for rows, columns, depth, warps, stages in product(heights, widths, depths, (4, 8), counts):
        width = columns * (2 if gated else 1)
        sums = rows * width // (32 * warps)  # float32 registers per thread
        if not (4 if small else 32) <= sums <= 128 or width > 256 or 2 * depth * (rows + width) * stages > SHARED:
            continue
        flags = ((False, False), (True, False), (False, True), (True, True)) if rows == 128 else ((False, False),)
        for persistent, descriptors in flags:
            yield Tile(rows, columns, depth, warps, stages, 1 if small else 8, persistent, descriptors)


def tune(
    models: Sequence[Model],
    clock: Clock,
    dtype: torch.dtype,
    search: Callable[[bool, int | None], Iterator[Tile]] = candidates,
) -> Iterator[str]:
    """Yields the source of TABLE in `gpu/tiles.py`: for each of its lines, the fastest of the tiles that `search` proposes.

    The fastest tile has the least geometric mean time over `models`.
    """
    yield f"# Tuned on {clock.name}, torch {torch.__version__}: µs per product, by model."
    for largest, *_ in TABLE:
        rows_per_expert = 256 if largest is None else max(1, largest * 3 // 4)  # at which the line is measured
        lines = [f"{largest}"]
        for gated in (True, False):
            times: dict[Tile, list[float]] = {}
            for model in models:
                for tile, seconds in _times(
                    model, rows_per_expert, gated, largest, clock, dtype, search(gated, largest)
                ):
                    times.setdefault(tile, []).append(seconds)
            complete = {tile: found for tile, found in times.items() if len(found) == len(models)}
            best = min(complete, key=lambda tile: sum(map(log, complete[tile])))
            mean = exp(sum(map(log, complete[best])) / len(models))
            by_model = ", ".join(f"{m.name} {s * 1e6:.1f}" for m, s in zip(models, complete[best], strict=True))
            product_name = "gate and up" if gated else "down"
            yield f"#   {rows_per_expert} rows per expert, {product_name}: {by_model} (mean {mean * 1e6:.1f})"
            lines.append(
                f"Tile({best.rows}, {best.columns}, {best.depth}, {best.warps}, {best.stages}, band={best.band}"
                f"{', persistent=True' if best.persistent else ''}{', descriptors=True' if best.descriptors else ''})"
            )
        yield f"    ({', '.join(lines)}),"


def _times(
    model: Model,
    rows_per_expert: int,
    gated: bool,
    largest: int | None,
    clock: Clock,
    dtype: torch.dtype,
    tiles: Iterator[Tile],
) -> Iterator[tuple[Tile, float]]:
    """Yields each of `tiles` that compiles and launches, with its seconds for one product of `model`."""
    experts = experts_of(model, dtype, "plain", clock.device)
    work = work_of(model, max(1, rows_per_expert * model.choices // model.gate.top_k), dtype, experts, clock.device)
    rows = len(work.rows)
    matrices = experts.gate_up if gated else experts.down
    x = work.rows if gated else torch.randn(rows, model.intermediate, device=clock.device).to(dtype)
    out = torch.empty(rows, model.intermediate if gated else model.hidden, dtype=dtype, device=clock.device)
    gemm = decode_gemm if largest is not None and largest <= DECODE_ROWS else grouped_gemm
    activation = experts.activation if gated else None
    launch = partial(gemm, x, work.offsets, matrices, out, rows=rows, activation=activation)
    for tile in tiles:
        try:
            seconds, _ = clock.seconds(partial(launch, tile=tile))
        except Exception as error:  # this version of Triton cannot compile or launch the tile
            if "CUDA error" in str(error):
                raise  # the device is lost: all later times would be wrong
            continue
        yield tile, seconds
