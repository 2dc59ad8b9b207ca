"""How much memory an application needs at least, and how much this machine has. Linux only; elsewhere it is unknown."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

from moiety.config.application import EXPERTS, ROUTER, AppSettings
from moiety.core.experts import ModelShape
from moiety.core.text import size
from moiety.deploy.arguments import initial_replicas
from moiety.model.checkpoint.checkpoint import EXPERT, Checkpoint
from moiety.model.checkpoint.headers import ITEM_BITS, TensorEntry
from moiety.model.checkpoint.quantised import Stored
from moiety.model.experts.cached import expert_layout
from moiety.model.experts.layout import ExpertLayout
from moiety.model.experts.unread import is_never_read

_PROC, _CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
_ITEM_BITS = {"float32": 32, "bfloat16": 16, "float16": 16}


@dataclass(frozen=True, slots=True)
class MachineMemory:
    """Bytes. `total` includes swap; a control group may grant less than the machine has."""

    total: int
    available: int

    @classmethod
    def here(cls, proc: Path = _PROC, cgroup: Path = _CGROUP) -> MachineMemory | None:
        """Returns the memory that this process may use now; None where the system does not report it."""
        lines = (_text(proc / "meminfo") or "").splitlines()
        kib = {line.partition(":")[0]: int(line.split()[1]) for line in lines if len(line.split()) > 1}
        if not {"MemTotal", "MemAvailable"} <= kib.keys():
            return None
        memory, available = kib["MemTotal"] << 10, kib["MemAvailable"] << 10
        for limit_file, used_file in (
            ("memory.max", "memory.current"),  # control groups of version 2, then of version 1
            ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
        ):
            limit, used = _text(cgroup / limit_file), _text(cgroup / used_file)
            if limit and used and limit.isdigit() and int(limit) < memory:
                memory, available = int(limit), min(available, max(0, int(limit) - int(used)))
        return cls(memory + (kib.get("SwapTotal", 0) << 10), available)


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """The least that the replicas of an application need together, in bytes, before they have served anything."""

    experts: int  # weights of all replicas of the expert groups
    trunks: int  # weights of all routers
    caches: int  # of all routers, once they are full: `kv_memory`
    cache: int  # of one router

    @classmethod
    def of(cls, settings: AppSettings, checkpoint: Checkpoint) -> MemoryNeed:
        """Computes the need from the headers of `checkpoint`."""
        layout = expert_layout(checkpoint)
        groups = [f"{EXPERTS}{group}" for group in range(settings.groups)]
        replicas = sum(initial_replicas(settings, group) for group in groups)
        routers = initial_replicas(settings, ROUTER)
        experts = _expert_bytes(settings, checkpoint, layout)
        trunk = _trunk_bytes(settings, checkpoint, layout)
        cache = int(settings.router.kv_memory)
        return cls(experts * replicas // settings.groups, routers * trunk, routers * cache, cache)

    @property
    def weights(self) -> int:
        return self.experts + self.trunks

    def __str__(self) -> str:
        parts = {"expert groups": self.experts, "routers": self.trunks, "kv_memory": self.caches}
        return " + ".join(f"{size(count)} ({name})" for name, count in parts.items())


def _expert_bytes(settings: AppSettings, checkpoint: Checkpoint, layout: ExpertLayout) -> int:
    """Returns the bytes of all routed experts in memory. Quantised ones stay as they are published, or grow."""
    stored = [checkpoint.tensor(name) for name in _expert_tensors(layout)]
    if any(not isinstance(entry, TensorEntry) for entry in stored):
        return sum(entry.nbytes for entry in stored)
    shape = layout.shape
    int8 = settings.experts.weights == "int8" or any(
        changes.get("weights") == "int8" for changes in settings.overrides.values()
    )
    bits = 8 if int8 else _bits(settings, shape)
    return shape.mlp.parameters * shape.experts * shape.moe_layers * bits // 8


def _trunk_bytes(settings: AppSettings, checkpoint: Checkpoint, layout: ExpertLayout) -> int:
    """Returns the bytes of a trunk, which has one data type."""
    experts = set(_expert_tensors(layout))
    trunk = (
        entry
        for name, entry in checkpoint.tensors.items()
        if name not in experts and not is_never_read(checkpoint, name)
    )
    bits = _bits(settings, layout.shape)
    return sum(_bytes_as(entry, bits) for entry in trunk)


def _bytes_as(entry: Stored, bits: int) -> int:
    """Returns the bytes of a tensor in memory, where floats have `bits` bits; at least so many for what is quantised."""
    if isinstance(entry, TensorEntry) and ITEM_BITS.get(entry.dtype, 0) < 16:
        return entry.nbytes
    return prod(entry.shape) * bits // 8


def _expert_tensors(layout: ExpertLayout) -> list[str]:
    """Returns the names of the tensors that hold routed experts."""
    return [
        name.replace(EXPERT, str(expert))
        for layer in layout.layers
        for names in layer.sources.values()
        for name in names
        for expert in range(layout.shape.experts if EXPERT in name else 1)
    ]


def _bits(settings: AppSettings, shape: ModelShape) -> int:
    """Returns the bits of a weight that is not quantised."""
    return _ITEM_BITS[shape.dtype if settings.dtype == "auto" else settings.dtype]


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
