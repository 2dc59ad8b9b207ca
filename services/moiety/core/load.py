"""What services report of their load: to the registry, for scaling and placement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """One expert replica's load over its last reporting window."""

    busy: float  # fraction of the window in which the device was occupied, 0 to 1
    queue_wait_ms: float  # mean time a call of the window waited for the device
    rows_per_s: float
    calls_per_s: float


@dataclass(frozen=True, slots=True)
class BatchCost:
    """What a batch costs an expert replica, `fixed_s + s_per_byte · activated weight bytes + s_per_row · rows`."""

    fixed_s: float
    s_per_byte: float
    s_per_row: float
    expert_bytes: int  # what one activated expert counts for
    samples: int  # batches that the fit has seen
    error: float  # median relative error of its latest predictions


@dataclass(frozen=True, slots=True)
class ExpertDemand:
    """A router's cumulative counters since it started. A new writer id is a reset; readers difference over a window."""

    rows: tuple[tuple[int, ...], ...]  # [moe_layers][experts]: rows sent to each expert
    activations: tuple[tuple[int, ...], ...]  # [moe_layers][experts]: steps in which each expert got at least one row
    time: float  # Unix seconds of this reading
    started: float = 0.0  # Unix seconds at which the counters were zero; 0 = unknown
    costs: BatchCost | None = None  # as the router has fitted them from replies so far
