"""Simulates Moiety and its alternatives on one trace and reports the comparison: as a table, a JSON value and a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from moiety.simulate.scenario import Cluster, Trace, day_trace, inclusion, popularity
from moiety.simulate.systems.baselines import clairvoyant, fixed, whole_engine
from moiety.simulate.systems.elastic import elastic
from moiety.simulate.systems.result import SystemResult
from moiety.simulate.systems.sizing import smallest, throughput
from moiety.simulate.systems.trace_load import TraceLoad

REDUNDANCY = 1 / 8  # redundant experts under EPLB: DeepSeek's own deployment has 32 for 256
BUSY_STEPS = np.arange(0.30, 0.9601, 0.0025)
HOT_SHARES = (0.0, 0.05, 0.1, 0.2)  # fractions of replicas given to hot sets, tried for the throughput under skew


@dataclass(frozen=True, slots=True)
class Report:
    """The results of all systems on one trace, each in the smallest size that meets the elastic system's p99."""

    cluster: Cluster
    trace: Trace
    results: tuple[SystemResult, ...]  # elastic, whole engines, EPLB, static, clairvoyant
    saved_vs_static: float  # fraction of device-hours
    of_clairvoyant: float  # fraction of the clairvoyant system's saving that elastic reaches
    skewed_over_uniform: float  # throughput under Zipf 1.0 over that under uniform load, same devices and p99

    def json(self) -> Mapping[str, object]:
        """Returns the report as plain values, with replicas and decisions over time."""
        return {
            "saved_vs_static": self.saved_vs_static,
            "of_clairvoyant": self.of_clairvoyant,
            "skewed_over_uniform": self.skewed_over_uniform,
            "cluster": {name: value for name, value in asdict(self.cluster).items() if name != "cost"}
            | {"fixed_s": self.cluster.cost.fixed_s, "s_per_byte": self.cluster.cost.s_per_byte}
            | {"s_per_row": self.cluster.cost.s_per_row},
            "trace": {
                "hours": self.trace.hours,
                "step_s": self.trace.step_s,
                "mean_tokens_per_s": float(self.trace.rates.mean()),
                "peak_over_mean": float(self.trace.rates.max() / self.trace.rates.mean()),
                "skew": self.trace.skew,
                "drift": self.trace.drift,
                "seed": self.trace.seed,
            },
            "systems": [
                {
                    "system": result.system,
                    "gpu_hours": result.gpu_hours,
                    "p50_ms": result.p50_ms,
                    "p99_ms": result.p99_ms,
                    "delayed": result.delayed,
                    "rebalances": result.rebalances,
                    "moved_bytes": result.moved_bytes,
                    "replicas": np.round(result.replicas, 1).tolist(),
                    "decisions": [
                        {"time_s": at, "deployment": decision.deployment, "from": decision.current, "to": decision.target,
                         "reason": decision.reason, "inputs": dict(decision.inputs)}
                        for at, decision in result.decisions
                    ],
                }
                for result in self.results
            ],
        }  # fmt: skip


def compare(cluster: Cluster, trace: Trace, progress: Callable[[str], None] = lambda _: None) -> Report:
    """Runs the elastic system with its default settings, then each other system in the smallest size with that p99 or less.

    If no size of a system meets the elastic system's p99, the report has the largest of its sizes.
    """
    load = TraceLoad(cluster, trace)
    progress("elastic groups and hot sets")
    ours = elastic(load)
    most = int(np.ceil(2 * ours.replicas.max() / cluster.groups)) + 1
    sizes = list(range(1, most + 1))
    progress("static EP, sized for the peak")
    static = smallest(lambda size: fixed(load, size), sizes, ours.p99_ms)
    progress("EPLB with fixed redundancy")
    eplb = smallest(lambda size: fixed(load, size, REDUNDANCY, "EPLB, 1/8 redundant"), sizes, ours.p99_ms)
    progress("whole engines")
    loosest_first = [float(-busy) for busy in BUSY_STEPS[::-1]]
    engines = smallest(lambda busy: whole_engine(load, -busy), loosest_first, ours.p99_ms)
    progress("clairvoyant")
    oracle = smallest(lambda busy: clairvoyant(load, -busy), loosest_first, ours.p99_ms)
    progress("throughput under skew")
    saved, possible = static.gpu_hours - ours.gpu_hours, static.gpu_hours - oracle.gpu_hours
    return Report(
        cluster,
        trace,
        (ours, engines, eplb, static, oracle),
        saved_vs_static=saved / static.gpu_hours,
        of_clairvoyant=saved / possible if possible > 0 else 0.0,
        skewed_over_uniform=skewed_over_uniform(cluster, ours.p99_ms, int(ours.replicas.max()), trace.seed),
    )


def skewed_over_uniform(cluster: Cluster, p99_ms: float, replicas: int, seed: int) -> float:
    """Returns the throughput under Zipf 1.0 divided by that under uniform load. Both use `replicas` and keep to `p99_ms`.

    Under Zipf, hot sets get the share of the replicas, out of HOT_SHARES, that gives the highest throughput.
    """
    flat = np.full((cluster.layers, cluster.experts), cluster.top_k / cluster.experts)
    skewed = inclusion(
        popularity(day_trace(1.0, hours=1, skew=1.0, drift=False, seed=seed), cluster, 0.0), cluster.top_k
    )
    best = max(throughput(cluster, skewed, p99_ms, replicas, round(share * replicas)) for share in HOT_SHARES)
    return best / throughput(cluster, flat, p99_ms, replicas)


def lines(report: Report) -> Iterator[str]:
    """Yields the lines of the report: the trace and cluster, a table with one line per system, and what elastic saves."""
    trace, cluster = report.trace, report.cluster
    static = next(result for result in report.results if result.system.startswith("static"))
    yield (
        f"{trace.hours:g} h, {trace.rates.mean():,.0f} tokens/s on average, peak/mean "
        f"{trace.rates.max() / trace.rates.mean():.2f}, Zipf {trace.skew:g}{', drifting' if trace.drift else ''}; "
        f"{cluster.layers} layers x {cluster.experts} experts in {cluster.groups} groups, "
        f"replicas start in {cluster.start_s:g} s"
    )
    header = ("system", "GPU-hours", "of static", "most replicas", "step p50", "step p99", "delayed")
    rows: list[Sequence[str]] = [header]
    rows += [
        (
            result.system,
            f"{result.gpu_hours:,.0f}",
            f"{result.gpu_hours / static.gpu_hours:.1%}",
            f"{result.replicas.max():,.0f}",
            f"{result.p50_ms:.1f} ms",
            f"{result.p99_ms:.1f} ms",
            f"{result.delayed:.2%}",
        )
        for result in report.results
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(
            cell.ljust(width) if not at else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
    ours = report.results[0]
    yield (
        f"elastic saves {report.saved_vs_static:.1%} of static at equal p99, {report.of_clairvoyant:.1%} of what "
        f"clairvoyant saves; {len(ours.decisions)} decisions, {ours.rebalances} rebalances"
    )
    yield f"throughput under Zipf 1.0 with hot sets allowed: {report.skewed_over_uniform:.1%} of that under uniform load"


def plot(report: Report, path: Path) -> None:
    """Draws load and replicas over time into `path`; its suffix chooses the format."""
    from matplotlib.figure import Figure  # the extra `plot`

    figure = Figure(figsize=(11, 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[1, 2.2])
    hours = np.arange(len(report.trace.rates)) * report.trace.step_s / 3600
    above.fill_between(hours, report.trace.rates / 1e6, color="0.8", linewidth=0)
    above.set_ylabel("million tokens/s")
    above.set_ylim(bottom=0)
    above.set_title("Load")
    styles = {
        "elastic": ("tab:blue", "-"),
        "clairvoyant": ("tab:green", "--"),
        "whole engines": ("tab:orange", "-"),
        "static EP": ("0.3", "-"),
    }
    for result in sorted(report.results, key=lambda one: one.system == "elastic"):
        colour, dash = styles.get(result.system, ("tab:red", ":"))
        below.plot(
            result.times_s / 3600,
            result.replicas,
            label=f"{result.system}: {result.gpu_hours:,.0f} GPU-hours",
            color=colour,
            linestyle=dash,
            linewidth=1.8 if result.system == "elastic" else 1.2,
        )
    below.set_ylabel("expert replicas")
    below.set_xlabel("hours")
    below.set_ylim(bottom=0)
    below.set_title(f"Replicas at equal p99 of a decode step ({report.results[0].p99_ms:.0f} ms)")
    below.legend(loc="lower right", frameon=False)
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
