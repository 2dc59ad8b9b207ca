"""One time step, vectorised: how busy every replica is, how long calls wait, and how long a decode step takes.

A router's step visits, layer by layer, one replica of every deployment that it has rows for, and waits for the slowest.
Each replica is an M/G/1 queue: a call waits with probability ρ, and then for the mean and variance of Pollaczek and
Khinchine (a geometric number of residual services), as a Weibull distribution. `events.py` plays the same cluster event by
event, to check that.

Legend: D deployments, L layers, E experts per layer, X points of a grid of times.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moiety.simulate.scenario import Cluster, Floats

FULL = 0.97  # busier than this no replica gets: routers wait with what is more
GRID = 24

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Holding:
    """Who holds what, as one entry per (deployment, layer, expert)."""

    deployments: int
    layers: int
    experts: int
    deployment: Ints  # [N]
    layer: Ints  # [N]
    expert: Ints  # [N]

    @classmethod
    def of(cls, held: Bools) -> Holding:
        """From a table [D, L, E]."""
        return cls(*held.shape, *np.nonzero(held))


@dataclass(frozen=True, slots=True)
class Work:
    """What one router's decode step asks of each deployment."""

    visits: Floats  # [D, L] probability that it has rows for it
    service_s: Floats  # [D, L] mean device time of such a call
    spread_s: Floats  # [D, L] its standard deviation
    weight_bytes: Floats  # [D, L] mean, of visits and non-visits
    rows: Floats  # [D, L]

    @property
    def device_s(self) -> Floats:
        """[D] device time of a whole step, on all replicas together."""
        total: Floats = (self.visits * self.service_s).sum(axis=1)
        return total


@dataclass(frozen=True, slots=True)
class Flow:
    """What comes of it."""

    busy: Floats  # [D]
    wait_s: Floats  # [D] mean
    served: float  # tokens per second, at most those offered
    step_s: float  # mean decode step
    step_sd_s: float


def work(cluster: Cluster, included: Floats, holding: Holding, replicas: Floats) -> Work:
    """For `included` [L, E] (see `scenario.inclusion`) and live `replicas` [D].

    An expert goes whole to one deployment, to each by its share of the replicas that hold it; all that a router has for a
    deployment goes to one replica of it. `policy.dispatch` spreads a large group's experts over more of its replicas:
    shorter calls, and more of them.
    """
    where = holding.deployment * holding.layers + holding.layer
    pair = holding.layer * holding.experts + holding.expert
    mine = replicas[holding.deployment]
    holders = np.bincount(pair, mine, minlength=holding.layers * holding.experts)[pair]
    share = np.divide(mine, holders, out=np.zeros_like(mine), where=holders > 0)
    included = included.ravel()[pair]

    def total(values: Floats) -> Floats:
        sums: Floats = np.bincount(where, values, minlength=holding.deployments * holding.layers).astype(np.float64)
        return sums.reshape(holding.deployments, holding.layers)

    activated = 1 - (1 - included) ** cluster.batch
    rows = cluster.batch * included
    read_s, row_s = cluster.cost.s_per_byte * cluster.expert_bytes, cluster.cost.s_per_row
    cost = read_s * activated + row_s * rows
    asked = share * activated
    visits = np.maximum(1 - np.exp(total(np.log1p(-np.minimum(asked, 1 - 1e-12)))), 1e-12)
    # Whether the expert goes here, whether a token has it, and how many do.
    spread = share * (
        (1 - share) * cost**2 + activated * (1 - activated) * read_s**2 + rows * (1 - included) * row_s**2
    )
    return Work(
        visits,
        cluster.cost.fixed_s + total(share * cost) / visits,
        np.sqrt(total(spread) / visits),
        total(asked) * cluster.expert_bytes,
        total(share * rows),
    )


def flow(
    cluster: Cluster, asked: Work, replicas: Floats, rate: float, routers: float = np.inf, steps_too: bool = True
) -> Flow:
    """At `rate` tokens per second offered. `routers` bounds what can wait at a replica: no router is ahead of itself.

    Without `steps_too`, which takes most of the time, `step_s` is nan.
    """
    steps = rate / cluster.batch
    unit = asked.device_s / np.maximum(replicas, 1e-9)  # busy per step a second
    fullest = float((steps * unit).max())
    served = rate * min(1.0, FULL / fullest) if fullest > 0 else rate
    busy = served / cluster.batch * unit
    seen = busy * (routers - 1) / routers if np.isfinite(routers) else busy
    calls = np.maximum(asked.visits.sum(axis=1), 1e-12)
    first = asked.device_s / calls
    second = (asked.visits * (asked.service_s**2 + asked.spread_s**2)).sum(axis=1) / calls
    late = np.maximum(second / np.maximum(2 * first * (1 - seen), 1e-12), 1e-9)  # [D] wait of those who wait
    if not steps_too:
        return Flow(busy, seen * late, served, np.nan, np.nan)
    mean, variance = _slowest(asked, seen, late)
    outside = cluster.attention_s + cluster.hop_s
    layers = asked.visits.shape[1]
    return Flow(
        busy=busy,
        wait_s=seen * late,
        served=served,
        step_s=float(mean.sum() + layers * outside),
        step_sd_s=float(np.sqrt(variance.sum() + layers * (cluster.jitter * outside) ** 2)),
    )


def _slowest(asked: Work, busy: Floats, late: Floats) -> tuple[Floats, Floats]:
    """[L] mean and variance of the slowest call of a layer, wait and service, by integrating its distribution."""
    quick, slow = asked.service_s - asked.spread_s, asked.service_s + asked.spread_s  # two points: mean and spread
    low = np.maximum(quick.max(axis=0), 0.0)  # [L] the slowest is hardly ever faster
    reach = (slow.max(axis=0) - low) + 8.0 * float(late.max())
    # Of residuals spread evenly over a service (mean r, variance r²/3), 1 / (1 - ρ) on average: relative to the mean wait.
    variation = np.sqrt((1 - busy) / 3 + busy)  # [D]
    power = variation**-1.086  # of the Weibull distribution with that coefficient of variation (Justus, 1978)
    scale = late / _gamma(1 + 1 / power)
    grid = np.linspace(0.0, 1.0, GRID) ** 2  # [X] dense where most of it happens
    points = low[:, None] + reach[:, None] * grid  # [L, X]
    survival = np.zeros((*asked.service_s.shape, GRID), dtype=np.float32)  # [D, L, X]
    exponent = power[:, None, None].astype(np.float32)
    for service in (quick, slow):
        beyond = ((points - service[:, :, None]) / scale[:, None, None]).astype(np.float32)
        waits = np.maximum(beyond, 1e-12) ** exponent
        survival += 0.5 * np.where(beyond < 0, 1.0, busy[:, None, None].astype(np.float32) * np.exp(-waits))
    done = np.exp(
        np.log1p(-np.minimum(asked.visits[:, :, None].astype(np.float32) * survival, 1 - 1e-6)).sum(axis=0)
    )  # [L, X]
    over = 1 - done
    step = reach[:, None] * grid
    mean = np.trapezoid(over, step, axis=1)
    square = np.trapezoid(2 * step * over, step, axis=1)
    return low + mean, np.maximum(square - mean**2, 0.0)


def _gamma(x: Floats) -> Floats:
    """Γ on 1.5 to 2, by Stirling's series: error below 1e-4."""
    y = x + 2  # Γ(x) = Γ(x + 2) / (x (x + 1))
    stirling = np.sqrt(2 * np.pi / y) * (y / np.e) ** y * (1 + 1 / (12 * y) + 1 / (288 * y * y))
    result: Floats = stirling / (x * (x + 1))
    return result


def percentile(means: Floats, spreads: Floats, weights: Floats, beyond: float, percent: float) -> float:
    """The `percent`-th percentile of step times: normal within each time step, weighted by the tokens in it.

    `beyond` is the weight of tokens that were not served in time; where they are too many it is inf.
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
    """The standard normal distribution function (Abramowitz & Stegun 26.2.17, error below 1e-7)."""
    t = 1 / (1 + 0.2316419 * np.abs(z))
    poly = t * (0.319381530 + t * (-0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429))))
    upper = np.exp(-z * z / 2) / np.sqrt(2 * np.pi) * poly
    result: Floats = np.where(z >= 0, 1 - upper, upper)
    return result
