"""What the benchmarks share: percentiles, plain tables, and the facts of the machine. Standard library only."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path


def percentile(samples: Sequence[float], percent: float) -> float:
    """The `percent`-th percentile of at least one sample, interpolated between neighbours; 50 is the median."""
    ordered = sorted(samples)
    position = (len(ordered) - 1) * percent / 100
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of right-aligned columns under their header."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class Machine:
    """Where numbers were measured."""

    processor: str
    cores: int
    load: float  # processes that wanted to run, mean of the minute before
    python: str
    torch: str
    transformers: str
    grpc: str

    @classmethod
    def here(cls) -> Machine:
        """This machine, now."""
        return cls(
            processor=_processor(),
            cores=usable_cores(),
            load=os.getloadavg()[0],
            python=platform.python_version(),
            torch=version("torch"),
            transformers=version("transformers"),
            grpc=version("grpcio"),
        )

    def lines(self) -> Iterator[str]:
        """For people."""
        yield f"machine: {self.processor}, {self.cores} cores, load {self.load:.1f} in the minute before"
        yield f"python {self.python}, torch {self.torch}, transformers {self.transformers}, grpcio {self.grpc}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
