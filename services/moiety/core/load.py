"""The load that services report to the registry, for scaling and placement."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """One replica's load over its last reporting window."""

    busy: float  # fraction of the window in which the device was occupied, 0 to 1
    queue_wait_ms: float  # mean time that a call in the window waited for the device
    rows_per_s: float
    calls_per_s: float


@dataclass(frozen=True, slots=True)
class BatchCost:
    """A fitted model of how many seconds an expert replica takes for a batch.

    seconds = `fixed_s + s_per_byte · weight bytes of the activated experts + s_per_row · rows`
    """

    fixed_s: float
    s_per_byte: float
    s_per_row: float
    expert_bytes: int  # weight bytes of one activated expert
    samples: int  # batches that the fit has used
    error: float  # median relative error of its latest predictions
    kind: str = ""  # of the replicas that it was fitted to: device, format of the weights, pace


@dataclass(frozen=True, slots=True)
class ExpertDemand:
    """A router's counters of rows and of activations of each expert, cumulative since the router started.

    Readers compute rates from the difference of two readings. A restarted router reports under a new replica id.
    """

    rows: tuple[tuple[int, ...], ...]  # [moe_layers][experts]: rows sent to each expert
    activations: tuple[tuple[int, ...], ...]  # [moe_layers][experts]: steps in which each expert got at least one row
    time: float  # Unix seconds of this reading
    started: float = 0.0  # Unix seconds at which the counters were zero; 0 = unknown
    costs: tuple[BatchCost, ...] = ()  # the router's fits to the batch times in the replies so far, one per kind
