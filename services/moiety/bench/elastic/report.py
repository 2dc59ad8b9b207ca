"""The report of `moiety bench elastic`: replicas and load over time, decisions, replica starts, token gaps; and a plot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moiety.bench.elastic.traffic import SkewedPrompts, Traffic
from moiety.bench.report import percentile
from moiety.core.load import BatchCost

# Token gaps count for a decision until this long after the last of its new replicas served its first rows.
AROUND_S = 3.0


@dataclass(frozen=True, slots=True)
class ReplicaStart:
    """When a replica reached each stage of its start, in Unix seconds; 0 = not yet reached."""

    replica: str
    deployment: str
    launched: float  # its process began to build it
    loaded: float  # its weights were in memory
    started: float  # it was registered
    served: float  # it had computed its first rows


@dataclass(frozen=True, slots=True)
class LoadSample:
    """Ready expert replicas, their load, and running requests at one time."""

    time: float  # Unix seconds
    replicas: Mapping[str, int]  # by deployment
    rows_per_s: Mapping[str, float]  # by deployment
    running: int  # requests
    starts: tuple[ReplicaStart, ...]


@dataclass(frozen=True, slots=True)
class Change:
    """One scaling decision, the replica starts that it caused, and the ITL (gaps between tokens) after it."""

    time: float  # seconds since the first phase began
    deployment: str
    before: int
    after: int
    reason: str
    itl_p99_ms: float | None  # from the decision until AROUND_S after its last new replica served its first rows
    since_step_s: float | None  # from the load step to the decision; growth only
    starts: tuple[Mapping[str, float], ...]  # seconds of each new replica: schedule, load, warm, serve, total


@dataclass(frozen=True, slots=True)
class ElasticReport:
    """The result of one run of `moiety bench elastic`."""

    hot: str
    capacity: float
    requests: int
    failures: tuple[str, ...]
    itl_p50_ms: float
    itl_p99_ms: float
    first_row_s: float | None  # from the load step to the first row that a new replica of the hot group served
    costs: BatchCost | None  # of an expert batch, as fitted by the router during the run
    changes: tuple[Change, ...]
    phases: tuple[tuple[float, float], ...]  # (seconds since the beginning, requests per second)
    timeline: tuple[Mapping[str, Any], ...]

    @property
    def passed(self) -> bool:
        """Whether no request failed, the hot group grew and shrank, and no other group changed."""
        moved = {change.deployment for change in self.changes}
        grew = any(change.after > change.before for change in self.changes)
        shrank = any(change.after < change.before for change in self.changes)
        return not self.failures and moved == {self.hot} and grew and shrank

    def data(self) -> dict[str, Any]:
        """Returns the report as plain values, for `--json`."""
        return asdict(self)


def report_of(
    capacity: float,
    prompts: SkewedPrompts,
    phases: Sequence[tuple[float, float]],
    moments: Sequence[LoadSample],
    decisions: Sequence[Mapping[str, Any]],
    traffic: Traffic,
    costs: BatchCost | None = None,
) -> ElasticReport:
    """Builds a run's report from its records. Times in the report are seconds since the first phase of the load began."""
    began = phases[0][0]
    starts = {start.replica: start for moment in moments for start in moment.starts}
    fresh = sorted((s for s in starts.values() if s.launched > began), key=lambda start: start.launched)
    changes = []
    for entry in (entry for entry in decisions if entry["time"] >= began):
        name, at, grown = entry["deployment"], float(entry["time"]), int(entry["to"]) - int(entry["from"])
        caused = [s for s in fresh if s.deployment == name and s.launched >= at][: max(grown, 0)]
        fresh = [s for s in fresh if s not in caused]
        until = max([at, *(s.served or s.started for s in caused)]) + AROUND_S
        gaps = [gap for time, gap in traffic.gaps if at <= time <= until]
        step = max((time for time, _ in phases if time <= at), default=began)
        changes.append(
            Change(
                time=at - began,
                deployment=name,
                before=int(entry["from"]),
                after=int(entry["to"]),
                reason=str(entry["reason"]),
                itl_p99_ms=1000 * percentile(gaps, 99) if gaps else None,
                since_step_s=at - step if grown > 0 else None,
                starts=tuple(_split(at, s) for s in caused if s.served),
            )
        )
    step = phases[1][0] if len(phases) > 1 else began
    served = [s.served for s in starts.values() if s.deployment == prompts.hot and s.launched > step and s.served]
    all_gaps = [gap for _, gap in traffic.gaps] or [0.0]
    return ElasticReport(
        hot=prompts.hot,
        capacity=capacity,
        requests=traffic.requests,
        failures=tuple(traffic.failures),
        itl_p50_ms=1000 * percentile(all_gaps, 50),
        itl_p99_ms=1000 * percentile(all_gaps, 99),
        first_row_s=min(served) - step if served else None,
        costs=costs,
        changes=tuple(changes),
        phases=tuple((time - began, rate) for time, rate in phases),
        timeline=tuple(
            {
                "time": moment.time - began,
                "replicas": dict(moment.replicas),
                "rows_per_s": dict(moment.rows_per_s),
                "running": moment.running,
            }
            for moment in moments
        ),
    )


def elastic_lines(report: ElasticReport) -> Iterator[str]:
    """Yields the lines of the report: the scaling decisions, the totals of the run, and last the verdict."""
    yield f"each replica is paced to {report.capacity:g} rows/s; {report.hot} is the hot group"
    for change in report.changes:
        itl = f"; ITL p99 {change.itl_p99_ms:.0f} ms" if change.itl_p99_ms is not None else ""
        since = f", {change.since_step_s:.1f} s after the load step" if change.since_step_s is not None else ""
        yield f"{change.time:6.1f} s  {change.deployment} {change.before} → {change.after}{since}{itl}"
        yield f"          {change.reason}"
        for start in change.starts:
            stages = ", ".join(f"{name} {seconds:.2f}" for name, seconds in start.items())
            yield f"          a new replica, seconds: {stages}"
    if report.first_row_s is not None:
        yield f"load step → first row served by a new replica: {report.first_row_s:.1f} s"
    yield f"{report.requests} requests, {len(report.failures)} failed"
    yield f"ITL of the whole run: p50 {report.itl_p50_ms:.0f} ms, p99 {report.itl_p99_ms:.0f} ms"
    yield from (f"failed: {failure}" for failure in sorted(set(report.failures))[:5])
    if (costs := report.costs) is not None:
        terms = (
            f"{1e3 * costs.fixed_s:.2f} ms + {1e9 * costs.s_per_byte:.2f} ms/MB + {1e3 * costs.s_per_row:.2f} ms/row"
        )
        yield f"cost of an expert batch, fitted from {costs.samples} batches: {terms}, median error {costs.error:.0%}"
    yield "only the hot group followed the load" if report.passed else "NOT as it should be: see above"


def plot(report: ElasticReport, file: Path) -> None:
    """Draws load and replicas over time as PNG or SVG, by the file's suffix."""
    from matplotlib.figure import Figure  # the extra `plot`

    times = [moment["time"] for moment in report.timeline]
    groups = sorted({name for moment in report.timeline for name in moment["replicas"]})
    colours = {name: "tab:red" if name == report.hot else f"C{9 - index % 9}" for index, name in enumerate(groups)}
    figure = Figure(figsize=(9, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for name in groups:
        rows = [moment["rows_per_s"].get(name, 0.0) for moment in report.timeline]
        counts = [moment["replicas"].get(name, 0) for moment in report.timeline]
        label = f"{name} (hot)" if name == report.hot else name
        above.plot(times, rows, color=colours[name], label=label)
        below.step(times, counts, where="post", color=colours[name], label=label)
    capacity = [report.capacity * moment["replicas"].get(report.hot, 0) for moment in report.timeline]
    above.step(times, capacity, where="post", color="tab:red", linestyle=":", label=f"capacity of {report.hot}")
    for at, rate in report.phases:
        above.axvline(at, color="grey", linewidth=0.8)
        above.annotate(f"{rate:g} requests/s", (at, 1.0), xycoords=("data", "axes fraction"), fontsize=8, va="top")
    for change in report.changes:
        below.axvline(change.time, color=colours.get(change.deployment, "grey"), linewidth=0.8, linestyle="--")
        below.annotate(
            f"{change.before} → {change.after}", (change.time, 0.05), xycoords=("data", "axes fraction"), fontsize=8
        )
    above.set_ylabel("rows per second")
    below.set_ylabel("ready replicas (dashed: decisions)")
    below.set_xlabel("seconds")
    below.set_ylim(bottom=0)
    below.yaxis.get_major_locator().set_params(integer=True)
    above.legend(fontsize=8, loc="upper right")
    figure.savefig(file, dpi=120)


def _split(decided: float, start: ReplicaStart) -> dict[str, float]:
    """Returns the seconds of each stage from the scaling decision to a new replica's first rows, and their total."""
    return {
        "schedule": start.launched - decided,
        "load": start.loaded - start.launched,
        "warm": start.started - start.loaded,
        "serve": start.served - start.started,
        "total": start.served - decided,
    }
