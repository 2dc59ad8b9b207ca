"""Reads facts about this machine and its processes. Standard library only; what Linux does not report is None."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from moiety_kernels.threads import usable_cores

_PROC, _SYS = Path("/proc"), Path("/sys")


def core_quota(root: Path = _SYS / "fs/cgroup") -> float | None:
    """Returns the cores that the control group grants (cgroup v2, then v1); None without a limit."""
    text = _text(root / "cpu.max")
    if text is not None:
        quota, _, period = text.partition(" ")
        return None if quota == "max" else int(quota) / int(period)
    quota_us, period_us = _text(root / "cpu/cpu.cfs_quota_us"), _text(root / "cpu/cpu.cfs_period_us")
    if quota_us is None or period_us is None or int(quota_us) < 0:
        return None
    return int(quota_us) / int(period_us)


def processor() -> str:
    """Returns the processor's name."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def instruction_sets() -> frozenset[str]:
    """Returns the processor's flags from /proc/cpuinfo; empty where there is no such file."""
    return frozenset((_cpuinfo("flags") or "").split())


def huge_pages() -> str | None:
    """Returns the setting of transparent huge pages: always, madvise or never; None where it is not reported."""
    text = _text(_SYS / "kernel/mm/transparent_hugepage/enabled")
    return None if text is None or "[" not in text else text.partition("[")[2].partition("]")[0]


def free_bytes(folder: str) -> int | None:
    """Returns the free bytes of the file system at `folder`; None where there is no such folder."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def last_level_cache_bytes() -> int | None:
    """Returns the size of the largest cache of core 0 in bytes; None where it is not reported."""
    sizes = [_text(index / "size") for index in (_SYS / "devices/system/cpu/cpu0/cache").glob("index*")]
    return max((int(size.removesuffix("K")) << 10 for size in sizes if size and size.endswith("K")), default=None)


def cpu_seconds(pid: int) -> float | None:
    """Returns the processor seconds that a process has used so far; None where they cannot be read."""
    text = _text(_PROC / str(pid) / "stat")
    if text is None:
        return None
    fields = text.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine and the library versions that numbers were measured with."""

    processor: str
    cores: int
    load: float  # load average of the minute before: processes that run or wait for a core
    python: str
    torch: str
    transformers: str
    grpc: str

    @classmethod
    def here(cls) -> Machine:
        """Describes this machine, its load and its installed libraries at the time of the call."""
        return cls(
            processor=processor(),
            cores=usable_cores(),
            load=os.getloadavg()[0],
            python=platform.python_version(),
            torch=version("torch"),
            transformers=version("transformers"),
            grpc=version("grpcio"),
        )

    def lines(self) -> Iterator[str]:
        """Yields two lines for a benchmark's report: the machine, and the library versions."""
        yield f"machine: {self.processor}, {self.cores} cores, load {self.load:.1f} in the minute before"
        yield f"python {self.python}, torch {self.torch}, transformers {self.transformers}, grpcio {self.grpc}"


def _cpuinfo(key: str) -> str | None:
    for line in (_text(_PROC / "cpuinfo") or "").splitlines():
        if line.startswith(key):
            return line.partition(":")[2].strip()
    return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
