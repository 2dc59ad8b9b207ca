"""`moiety bench memory`: compares the peak memory of expert replicas with the bytes of the weights they hold.

The peak is that of a replica's whole process, from the start of the process to the replica's first answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moiety.client import Client
from moiety.core.experts import ExpertSet
from moiety.local.cluster import LocalCluster
from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.experts.cached import expert_layout
from moiety.policy.precision import Precision
from moiety.synthetic import write_tiny
from moiety.tools.quantize.quantize import expert_tensor_names, write_quantised

FACTOR, EXTRA = 1.15, 200_000_000  # bound on the peak: FACTOR * weights + EXTRA bytes, Python and torch included
LAYER: Mapping[str, Any] = {"hidden_size": 1024, "moe_intermediate_size": 512, "num_experts": 32, "head_dim": 64}
LAYER_BYTES = 32 * 3 * 1024 * 512 * 2  # bytes of a layer's experts in bfloat16
INT4 = Precision(4, 128)


@dataclass(frozen=True, slots=True)
class ReplicaMemory:
    """Memory of one expert replica that holds its experts as bfloat16, int8 or int4."""

    held_as: str  # the form: bfloat16, int8 or int4
    replica: str
    weights: int  # bytes of the experts it holds
    peak: int  # bytes; the process's high-water mark of resident memory

    @property
    def bound(self) -> int:
        return int(FACTOR * self.weights) + EXTRA

    @property
    def ok(self) -> bool:
        return self.peak <= self.bound


async def bench_memory(
    work: Path,
    *,
    gigabytes: float = 2.2,
    groups: int = 1,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[ReplicaMemory, ...]:
    """Measures expert replicas that hold one model as bfloat16, int8 and int4. Returns a row per replica and form.

    Writes a synthetic bfloat16 checkpoint with `gigabytes` of experts to the folder `work`, and a copy with experts at 4
    bits. For int8, serves the bfloat16 checkpoint with experts quantised to 8 bits on load.
    """
    layers = max(1, round(gigabytes * 1e9 / LAYER_BYTES))
    progress(f"writing {layers} layers, {layers * LAYER_BYTES / 1e9:.1f} GB of experts")
    plain = await asyncio.to_thread(
        write_tiny, "qwen3_moe", work / "bfloat16", dtype="bfloat16", num_hidden_layers=layers, **LAYER
    )
    progress("quantising the experts to 4 bits")
    await asyncio.to_thread(_quantise, plain, work / "int4")
    rows: list[ReplicaMemory] = []
    for held_as, folder, weights in (
        ("bfloat16", plain, "auto"),
        ("int8, quantised on load", plain, "int8"),
        ("int4, as published", work / "int4", "auto"),
    ):
        progress(f"serving {held_as}")
        async with LocalCluster(folder, groups=groups, weights=weights) as cluster:
            async with Client(cluster.address) as client:
                async for _ in client.generate("Each expert group is a service of its own.", max_tokens=8):
                    pass
            for group in range(groups):
                child = cluster.experts(group)[0]
                size = _held_bytes(folder, cluster.partition[group]) // (2 if weights == "int8" else 1)
                rows.append(ReplicaMemory(held_as, child.replica.deployment, size, peak_bytes(child.pid)))
    return tuple(rows)


def _quantise(folder: Path, out: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    layout = expert_layout(checkpoint)
    every = ExpertSet.uniform(layout.shape.moe_layers, range(layout.shape.experts))
    write_quantised(checkpoint, layout, dict.fromkeys(every, INT4), out)


def _held_bytes(folder: Path, held: ExpertSet) -> int:
    """Returns the bytes of the experts `held` in the files of `folder`. They take the same in memory if loaded as stored."""
    checkpoint = Checkpoint.open(folder)
    layout = expert_layout(checkpoint)
    return sum(checkpoint.tensor(name).nbytes for pair in held for name in expert_tensor_names(layout, pair))


def peak_bytes(pid: int) -> int:
    """Returns the peak resident memory of a process so far, in bytes. Linux only."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) << 10


def memory_lines(rows: tuple[ReplicaMemory, ...]) -> Iterator[str]:
    """Yields the lines of the report: a table with one line per form and replica, and last the verdict."""
    yield f"{'experts':<25} {'replica':<12} {'weights MB':>11} {'peak MB':>9} {'bound MB':>9} {'peak / weights':>15}"
    for row in rows:
        yield (
            f"{row.held_as:<25} {row.replica:<12} {row.weights / 1e6:>11.0f} {row.peak / 1e6:>9.0f} {row.bound / 1e6:>9.0f} "
            f"{row.peak / row.weights:>15.2f}"
        )
    failed = sum(not row.ok for row in rows)
    verdict = f"{failed} of {len(rows)} above" if failed else f"all {len(rows)} within"
    yield f"{'FAIL' if failed else 'PASS'}: {verdict} {FACTOR} x weights + {EXTRA // 1_000_000} MB, the process included"
