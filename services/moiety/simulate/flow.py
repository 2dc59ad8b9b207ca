"""Computes one time step, vectorised: how busy each replica is, how long calls wait, and how long a decode step takes.

Layer by layer, a router's step calls one replica of every deployment that it has rows for, and waits for the slowest.
Each replica is an M/G/1 queue. A call waits with probability ρ, the busy fraction. The wait is then a Weibull
distribution with the mean and variance of Pollaczek and Khinchine (a geometric number of residual services). As a check, a
test simulates the same cluster event by event.

Legend: D deployments, L layers, E experts per layer, X points of a grid of times.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moiety.simulate.scenario import Cluster, Floats

FULL = 0.97  # largest busy fraction of a replica; routers hold back the load beyond it
GRID = 24

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class HeldExperts:
    """Which deployment holds which experts, as one entry per (deployment, layer, expert)."""

    deployments: int
    layers: int
    experts: int
    deployment: Ints  # [N]
    layer: Ints  # [N]
    expert: Ints  # [N]

    @classmethod
    def of(cls, held: Bools) -> HeldExperts:
        """Builds the entries from the table `held` [D, L, E]: whether a deployment holds an expert."""
        return cls(*held.shape, *np.nonzero(held))


@dataclass(frozen=True, slots=True)
class StepWork:
    """The work of one router's decode step on each deployment."""

    visits: Floats  # [D, L] probability that the step calls the deployment
    service_s: Floats  # [D, L] mean device time of a call
    spread_s: Floats  # [D, L] standard deviation of that time
    weight_bytes: Floats  # [D, L] mean bytes of activated weights per step, steps without a call included
    rows: Floats  # [D, L] mean rows per step

    @property
    def device_s(self) -> Floats:
        """[D] device seconds that one router's step takes on each deployment, over all layers and replicas."""
        total: Floats = (self.visits * self.service_s).sum(axis=1)
        return total


@dataclass(frozen=True, slots=True)
class TimeStep:
    """The state of the cluster in one time step."""

    busy: Floats  # [D] busy fraction of each deployment's replicas
    wait_s: Floats  # [D] mean wait of a call
    served: float  # tokens per second, at most the offered rate
    step_s: float  # mean time of a decode step
    step_sd_s: float  # its standard deviation


def work_per_step(cluster: Cluster, included: Floats, holding: HeldExperts, replicas: Floats) -> StepWork:
    """Computes the work of one step for `included` [L, E] (see `scenario.inclusion`) and live `replicas` [D].

    All rows of an expert go to one deployment, with a probability equal to its share of the replicas that hold the expert.
    All rows of a router for a deployment go to one of its replicas. `policy/dispatch.py` instead spreads a large group's
    experts over several of its replicas, which gives more and shorter calls.
    """
    where = holding.deployment * holding.layers + holding.layer
    pair = holding.layer * holding.experts + holding.expert
    live = replicas[holding.deployment]
    holders = np.bincount(pair, live, minlength=holding.layers * holding.experts)[pair]
    share = np.divide(live, holders, out=np.zeros_like(live), where=holders > 0)
    included = included.ravel()[pair]

    def total(values: Floats) -> Floats:
        sums: Floats = np.bincount(where, values, minlength=holding.deployments * holding.layers).astype(np.float64)
        return sums.reshape(holding.deployments, holding.layers)

    activated = 1 - (1 - included) ** cluster.batch
    rows = cluster.batch * included
    read_s, row_s = cluster.cost.s_per_byte * cluster.expert_bytes, cluster.cost.s_per_row
    cost = read_s * activated + row_s * rows
    called = share * activated
    visits = np.maximum(1 - np.exp(total(np.log1p(-np.minimum(called, 1 - 1e-12)))), 1e-12)
    # Three sources of variance: whether the expert goes here, whether any token has it, and how many tokens have it.
    spread = share * (
        (1 - share) * cost**2 + activated * (1 - activated) * read_s**2 + rows * (1 - included) * row_s**2
    )
    return StepWork(
        visits,
        cluster.cost.fixed_s + total(share * cost) / visits,
        np.sqrt(total(spread) / visits),
        total(called) * cluster.expert_bytes,
        total(share * rows),
    )


def time_step(
    cluster: Cluster,
    step_work: StepWork,
    replicas: Floats,
    rate: float,
    routers: float = np.inf,
    steps_too: bool = True,
) -> TimeStep:
    """Computes the state of the cluster when `rate` tokens per second are offered.

    A router does not queue behind its own calls, so calls of few `routers` wait less. Without `steps_too`, `step_s` and
    `step_sd_s` are nan, which saves most of the computing time.
    """
    steps = rate / cluster.batch
    unit = step_work.device_s / np.maximum(replicas, 1e-9)  # busy fraction per (step per second)
    fullest = float((steps * unit).max())
    served = rate * min(1.0, FULL / fullest) if fullest > 0 else rate
    busy = served / cluster.batch * unit
    seen = busy * (routers - 1) / routers if np.isfinite(routers) else busy
    calls = np.maximum(step_work.visits.sum(axis=1), 1e-12)
    first = step_work.device_s / calls
    second = (step_work.visits * (step_work.service_s**2 + step_work.spread_s**2)).sum(axis=1) / calls
    # [D] mean wait of the calls that wait
    queued_s = np.maximum(second / np.maximum(2 * first * (1 - seen), 1e-12), 1e-9)
    if not steps_too:
        return TimeStep(busy, seen * queued_s, served, np.nan, np.nan)
    mean, variance = _slowest(step_work, seen, queued_s)
    outside = cluster.attention_s + cluster.hop_s
    layers = step_work.visits.shape[1]
    return TimeStep(
        busy=busy,
        wait_s=seen * queued_s,
        served=served,
        step_s=float(mean.sum() + layers * outside),
        step_sd_s=float(np.sqrt(variance.sum() + layers * (cluster.jitter * outside) ** 2)),
    )


def _slowest(step_work: StepWork, busy: Floats, queued_s: Floats) -> tuple[Floats, Floats]:
    """Returns [L] mean and variance of a layer's slowest call, wait plus service, by integrating its distribution."""
    # A two-point distribution of service times with the right mean and standard deviation.
    quick, slow = step_work.service_s - step_work.spread_s, step_work.service_s + step_work.spread_s
    low = np.maximum(quick.max(axis=0), 0.0)  # [L] the slowest call is hardly ever faster
    reach = (slow.max(axis=0) - low) + 8.0 * float(queued_s.max())
    # Coefficient of variation of the wait: the sum of on average 1 / (1 - ρ) residual services, each uniform over a service
    # (mean r, variance r²/3).
    variation = np.sqrt((1 - busy) / 3 + busy)  # [D]
    power = variation**-1.086  # shape of the Weibull distribution with that coefficient of variation (Justus, 1978)
    scale = queued_s / _gamma(1 + 1 / power)
    grid = np.linspace(0.0, 1.0, GRID) ** 2  # [X] denser at the short times, where the distribution changes most
    points = low[:, None] + reach[:, None] * grid  # [L, X]
    survival = np.zeros((*step_work.service_s.shape, GRID), dtype=np.float32)  # [D, L, X]
    exponent = power[:, None, None].astype(np.float32)
    for service in (quick, slow):
        beyond = ((points - service[:, :, None]) / scale[:, None, None]).astype(np.float32)
        waits = np.maximum(beyond, 1e-12) ** exponent
        survival += 0.5 * np.where(beyond < 0, 1.0, busy[:, None, None].astype(np.float32) * np.exp(-waits))
    # [L, X]
    done = np.exp(
        np.log1p(-np.minimum(step_work.visits[:, :, None].astype(np.float32) * survival, 1 - 1e-6)).sum(axis=0)
    )
    over = 1 - done
    step = reach[:, None] * grid
    mean = np.trapezoid(over, step, axis=1)
    square = np.trapezoid(2 * step * over, step, axis=1)
    return low + mean, np.maximum(square - mean**2, 0.0)


def _gamma(x: Floats) -> Floats:
    """Returns Γ on 1.5 to 2 by Stirling's series; error below 1e-4."""
    y = x + 2  # Γ(x) = Γ(x + 2) / (x (x + 1))
    stirling = np.sqrt(2 * np.pi / y) * (y / np.e) ** y * (1 + 1 / (12 * y) + 1 / (288 * y * y))
    result: Floats = stirling / (x * (x + 1))
    return result


def percentile(means: Floats, spreads: Floats, weights: Floats, beyond: float, percent: float) -> float:
    """Returns the `percent`-th percentile of step times over several time steps.

    Each time step counts as a normal distribution (`means`, `spreads`) weighted by its tokens (`weights`). `beyond`: the
    tokens not served in time. If these are more than (100 - `percent`) % of all tokens, the result is inf.
    """
    total = weights.sum() + beyond
    if beyond > (1 - percent / 100) * total:
        return float("inf")
    low, high = 0.0, float((means + 8 * spreads).max())
    for _ in range(50):
        middle = (low + high) / 2
        below = (weights * _normal((middle - means) / np.maximum(spreads, 1e-12))).sum()
        low, high = (middle, high) if below < percent / 100 * total else (low, middle)
    return high


def _normal(z: Floats) -> Floats:
    """Returns the standard normal distribution function (Abramowitz & Stegun 26.2.17, error below 1e-7)."""
    t = 1 / (1 + 0.2316419 * np.abs(z))
    poly = t * (0.319381530 + t * (-0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429))))
    upper = np.exp(-z * z / 2) / np.sqrt(2 * np.pi) * poly
    result: Floats = np.where(z >= 0, 1 - upper, upper)
    return result
