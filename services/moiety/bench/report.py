"""Percentiles and plain tables, shared by the benchmarks. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def percentile(samples: Sequence[float], percent: float) -> float:
    """Returns the `percent`-th percentile of at least one sample, interpolated between neighbours; 50 is the median."""
    ordered = sorted(samples)
    position = (len(ordered) - 1) * percent / 100
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yields the lines of a table with right-aligned columns, the header first."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
