"""The simulated scenario: a model and its devices, traces of load, and the popularity of each expert. All seeded.

Legend: L layers, E experts per layer, S time steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from moiety.policy.cost_model import KernelCost

Floats = npt.NDArray[np.float64]

TOPICS = 4
TOPIC_PERIODS_S = (4 * 3600.0, 5.5 * 3600.0, 7 * 3600.0, 9 * 3600.0)
DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Cluster:
    """The simulated model, of DeepSeek-V3's size, and its replicas: one H100-like device each, with memory for one group.

    A replica's costs are assumed, not measured here: 2.4 TB/s for weights, 400 TFLOP/s for rows (2 · 3 · 7168 · 2048 each),
    30 µs for a call. Attention and the hop take an assumed time per layer, with a normally distributed jitter.
    """

    layers: int = 58
    experts: int = 256
    top_k: int = 8
    expert_bytes: int = 44_040_192  # fp8
    groups: int = 32
    hot_sets: int = 4
    batch: int = 512  # tokens of one router's decode step
    cost: KernelCost = field(default_factory=lambda: KernelCost.seeded(30e-6, 1 / 2.4e12, 0.22e-6))
    attention_s: float = 200e-6  # per layer
    hop_s: float = 50e-6  # per layer, round trip
    jitter: float = 0.1  # standard deviation of attention and hop, relative
    start_s: float = 30.0  # from the decision to the first row: starts a process, loads 20 GB of weights to the device
    read_bytes_per_s: float = 2e9  # rate at which a live replica loads weights beside its work

    @property
    def experts_per_replica(self) -> int:
        """(layer, expert) pairs that fit into a replica: one group's share."""
        return self.layers * -(-self.experts // self.groups)


@dataclass(frozen=True, slots=True)
class Trace:
    """Tokens per second over time, and how popular each expert is."""

    step_s: float
    rates: Floats  # [S] tokens per second
    skew: float  # Zipf exponent of the experts within a topic
    drift: bool  # whether the topics' shares change
    seed: int

    @property
    def hours(self) -> float:
        return len(self.rates) * self.step_s / 3600.0


def day_trace(
    mean: float,
    *,
    hours: float = 24.0,
    step_s: float = 10.0,
    peak_over_mean: float = 2.0,
    bursts_per_hour: float = 0.5,
    burst: float = 0.2,
    noise: float = 0.02,
    skew: float = 0.8,
    drift: bool = True,
    seed: int = 0,
) -> Trace:
    """Makes the trace of a day: a smooth curve from night to evening whose highest step is `peak_over_mean` times its mean.

    The curve is a raised sine to a power. It is changed by noise with a correlation time of a minute, and by
    `bursts_per_hour` bursts. A burst rises within a minute by up to `burst` of the load, stays for 2 to 10 minutes and
    fades. With `hours` below 24, the trace starts at the morning's rise. The power is chosen so that the peak-to-mean
    ratio holds with bursts and noise.
    """
    random = np.random.default_rng(seed)
    count = round(hours * 3600 / step_s)
    time = 7 * 3600 + np.arange(count) * step_s if hours < 24 else np.arange(count) * step_s
    phase = 0.5 - 0.5 * np.cos(2 * np.pi * (time / DAY_S - 4 / 24))
    phase /= phase.max()
    factor = np.ones(count)
    for start in np.flatnonzero(random.random(count) < bursts_per_hour * step_s / 3600):
        height, hold = burst * random.uniform(0.3, 1.0), random.uniform(120, 600)
        age = np.arange(count - start) * step_s
        shape = np.minimum(age / 60, 1.0) * np.exp(-np.maximum(age - hold, 0.0) / 60)
        factor[start:] += height * shape
    memory = float(np.exp(-step_s / 60))
    wobble = np.zeros(count)
    for index, shock in enumerate(random.standard_normal(count)[1:], start=1):
        wobble[index] = memory * wobble[index - 1] + noise * (1 - memory**2) ** 0.5 * shock
    factor *= np.exp(wobble)

    def curve(power: float) -> Floats:
        return (0.15 + 0.85 * phase**power) * factor

    low, high = 0.05, 20.0
    for _ in range(60):
        power = (low + high) / 2
        shape = curve(power)
        low, high = (power, high) if shape.max() / shape.mean() < peak_over_mean else (low, power)
    shape = curve(power)
    return Trace(step_s, mean * shape / shape.mean(), skew, drift, seed)


def popularity(trace: Trace, cluster: Cluster, time_s: float) -> Floats:
    """Returns [L, E]: each expert's share of a layer's routing decisions at `time_s`; rows sum to 1.

    Within a topic, shares follow Zipf over an order that differs per layer. With drift, the shares of four topics wander
    over hours.
    """
    random = np.random.default_rng(trace.seed + 1)
    weights = 1.0 / np.arange(1, cluster.experts + 1) ** trace.skew
    weights /= weights.sum()
    topics = TOPICS if trace.drift else 1
    orders = [random.permuted(np.tile(weights, (cluster.layers, 1)), axis=1) for _ in range(topics)]
    phases = random.uniform(0, 2 * np.pi, topics)
    shares = np.exp(1.5 * np.sin(2 * np.pi * time_s / np.array(TOPIC_PERIODS_S[:topics]) + phases))
    shares /= shares.sum()
    mixed: Floats = np.tensordot(shares, np.stack(orders), axes=1)
    return mixed


def inclusion(popular: Floats, top_k: int) -> Floats:
    """Returns [L, E]: the probability that an expert is among a token's `top_k` different ones; rows sum to `top_k`.

    Poisson approximation of successive sampling without replacement: 1 - exp(-κ p), with κ chosen so that the sum is `top_k`.
    """
    low, high = np.full((len(popular), 1), 0.0), np.full((len(popular), 1), 1.0)
    while (np.sum(1 - np.exp(-high * popular), axis=1) < top_k).any():
        high *= 2
    for _ in range(50):
        kappa = (low + high) / 2
        short = np.sum(1 - np.exp(-kappa * popular), axis=1, keepdims=True) < top_k
        low, high = np.where(short, kappa, low), np.where(short, high, kappa)
    included: Floats = 1 - np.exp(-high * popular)
    return included
