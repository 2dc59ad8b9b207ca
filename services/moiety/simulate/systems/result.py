"""The result of a simulated system on one trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from moiety.policy.autoscale import Decision
from moiety.simulate.flow import TimeStep, percentile
from moiety.simulate.scenario import Floats, Trace

SAMPLED = 360  # time steps at which the step times of baselines are computed


@dataclass(frozen=True, slots=True)
class SystemResult:
    """The result of one system on one trace."""

    system: str
    gpu_hours: float
    p50_ms: float  # of a decode step, over all tokens
    p99_ms: float
    delayed: float  # fraction of tokens that came while every router waited for a full replica
    times_s: Floats = field(repr=False)
    replicas: Floats = field(repr=False)  # paid replicas over time, starting ones included
    decisions: tuple[tuple[float, Decision], ...] = field(default=(), repr=False)
    rebalances: int = 0
    moved_bytes: float = 0.0


@dataclass(slots=True)
class Recorder:
    """Sums up the time steps of one run."""

    trace: Trace
    backlog: float = 0.0  # tokens that wait to be served
    _delayed: float = 0.0
    _rows: list[tuple[float, float, float, float]] = field(default_factory=list)  # replicas, mean, sd, tokens

    def add(self, seen: TimeStep, replicas: float, rate: float, steps: int = 1) -> None:
        """Adds `steps` equal time steps, in which `rate` tokens per second were offered in addition to the backlog."""
        seconds = self.trace.step_s * steps
        offered = rate * seconds + self.backlog
        served = min(seen.served * seconds, offered)
        left = offered - served
        if left > 1e-6 * offered:
            self._delayed += min(served, rate * seconds)
        self.backlog = left if left > 1e-6 * offered else 0.0
        self._rows += [(replicas, seen.step_s, seen.step_sd_s, served / steps)] * steps

    def result(
        self, system: str, decisions: Sequence[tuple[float, Decision]] = (), rebalances: int = 0, moved: float = 0.0
    ) -> SystemResult:
        """Returns the result of the run. Tokens of time steps that left a backlog count as infinitely slow."""
        replicas, means, spreads, tokens = np.array(self._rows).T
        late = self._delayed + self.backlog
        known = ~np.isnan(means)
        means, spreads, weights = means[known], spreads[known], tokens[known] / tokens[known].sum()
        weights *= max(0.0, float(tokens.sum()) - late)
        return SystemResult(
            system=system,
            gpu_hours=float(replicas.sum() * self.trace.step_s / 3600),
            p50_ms=1000 * percentile(means, spreads, weights, late, 50),
            p99_ms=1000 * percentile(means, spreads, weights, late, 99),
            delayed=float(late / (tokens.sum() + self.backlog)),
            times_s=np.arange(len(replicas), dtype=np.float64) * self.trace.step_s,
            replicas=replicas,
            decisions=tuple(decisions),
            rebalances=rebalances,
            moved_bytes=moved,
        )
