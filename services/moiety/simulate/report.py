"""Runs the systems on one trace and tells what came of it: a table, a JSON value, a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from moiety.errors import FailedPrecondition
from moiety.simulate.scenario import Cluster, Trace, day_trace, inclusion, popularity
from moiety.simulate.systems.baselines import clairvoyant, fixed, whole_engine
from moiety.simulate.systems.elastic import elastic
from moiety.simulate.systems.result import SystemResult
from moiety.simulate.systems.sizing import smallest, throughput
from moiety.simulate.systems.trace_load import TraceLoad

REDUNDANCY = 1 / 8  # of EPLB: DeepSeek's own deployment has 32 redundant experts for 256
BUSY_STEPS = np.arange(0.30, 0.9601, 0.0025)
HOT_SHARES = (0.0, 0.05, 0.1, 0.2)  # of the replicas that may be hot sets, tried for the throughput under skew


@dataclass(frozen=True, slots=True)
class Report:
    """All systems at the elastic one's p99."""

    cluster: Cluster
    trace: Trace
    outcomes: tuple[SystemResult, ...]  # elastic, whole engines, EPLB, static, clairvoyant
    saved_vs_static: float  # fraction of device-hours
    of_clairvoyant: float  # of what a clairvoyant would save, the fraction that is saved
    skewed_over_uniform: float  # throughput under Zipf 1.0 over that of uniform load, same devices and p99

    def json(self) -> Mapping[str, object]:
        """Plain values; replicas and decisions over time included."""
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
                    "system": each.system,
                    "gpu_hours": each.gpu_hours,
                    "p50_ms": each.p50_ms,
                    "p99_ms": each.p99_ms,
                    "delayed": each.delayed,
                    "rebalances": each.rebalances,
                    "moved_bytes": each.moved_bytes,
                    "replicas": np.round(each.replicas, 1).tolist(),
                    "decisions": [
                        {"time_s": at, "deployment": made.deployment, "from": made.current, "to": made.target,
                         "reason": made.reason, "inputs": dict(made.inputs)}
                        for at, made in each.decisions
                    ],
                }
                for each in self.outcomes
            ],
        }  # fmt: skip


def compare(cluster: Cluster, trace: Trace, progress: Callable[[str], None] = lambda _: None) -> Report:
    """Elastic first, with its default settings; then each other system in the smallest size that meets its p99."""
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
    """Throughput of `replicas` under Zipf 1.0 over that under uniform load, both within `p99_ms`; best share of hot sets."""
    flat = np.full((cluster.layers, cluster.experts), cluster.top_k / cluster.experts)
    skewed = inclusion(
        popularity(day_trace(1.0, hours=1, skew=1.0, drift=False, seed=seed), cluster, 0.0), cluster.top_k
    )
    best = max(throughput(cluster, skewed, p99_ms, replicas, round(share * replicas)) for share in HOT_SHARES)
    return best / throughput(cluster, flat, p99_ms, replicas)


def lines(report: Report) -> Iterator[str]:
    """The table for people."""
    trace, cluster = report.trace, report.cluster
    static = next(each for each in report.outcomes if each.system.startswith("static"))
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
            each.system,
            f"{each.gpu_hours:,.0f}",
            f"{each.gpu_hours / static.gpu_hours:.1%}",
            f"{each.replicas.max():,.0f}",
            f"{each.p50_ms:.1f} ms",
            f"{each.p99_ms:.1f} ms",
            f"{each.delayed:.2%}",
        )
        for each in report.outcomes
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(
            cell.ljust(width) if not at else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
    ours = report.outcomes[0]
    yield (
        f"elastic saves {report.saved_vs_static:.1%} of static at equal p99, {report.of_clairvoyant:.1%} of what a "
        f"clairvoyant would; {len(ours.decisions)} decisions, {ours.rebalances} rebalances"
    )
    yield f"throughput under Zipf 1.0, hot sets allowed: {report.skewed_over_uniform:.1%} of uniform load's"


def plot(report: Report, path: Path) -> None:
    """Load and replicas over time, as a PNG or whatever the name's ending says."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise FailedPrecondition("a picture needs matplotlib: pip install 'moiety[plot]'") from None
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
    for each in sorted(report.outcomes, key=lambda one: one.system == "elastic"):
        colour, dash = styles.get(each.system, ("tab:red", ":"))
        below.plot(
            each.times_s / 3600,
            each.replicas,
            label=f"{each.system}: {each.gpu_hours:,.0f} GPU-hours",
            color=colour,
            linestyle=dash,
            linewidth=1.8 if each.system == "elastic" else 1.2,
        )
    below.set_ylabel("expert replicas")
    below.set_xlabel("hours")
    below.set_ylim(bottom=0)
    below.set_title(f"Replicas at equal p99 of a decode step ({report.outcomes[0].p99_ms:.0f} ms)")
    below.legend(loc="lower right", frameon=False)
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
