"""The report of a run: rates, percentiles and failures, as lines and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moiety.bench.load.goodput import MEASURES, Target, meets
from moiety.bench.load.own_delay import OwnDelay
from moiety.bench.load.record import Record
from moiety.bench.report import percentile, table


@dataclass(frozen=True, slots=True)
class Spread:
    """How the values of one measure are spread, in ms."""

    samples: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True)
class Failure:
    """The requests that failed in one way, and the message of the first."""

    count: int
    message: str


@dataclass(frozen=True, slots=True)
class Goodput:
    """The requests that met every target. Of all offered ones: those that failed or were not sent count as missed."""

    targets: tuple[Target, ...]
    fraction: float
    per_s: float


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """One request: times in ms, the first from the start of the run. What it did not reach is None."""

    due_ms: float
    sent_late_ms: float
    ttft_ms: float | None
    e2e_ms: float | None
    prompt_tokens: int
    output_tokens: int
    failure: str | None


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What one run measured. A measure without a sample is missing from `spreads`."""

    offered: int  # requests that arrived, sent or not
    ok: int
    failed: int
    not_sent: int  # they arrived while max_in_flight others ran
    unfinished: int  # the run was interrupted
    empty: int  # ok, but without output
    peak_in_flight: int
    duration_s: float  # from the start to the last answer
    offered_per_s: float | None  # while requests arrived; None in a closed loop
    ok_per_s: float
    prompt_tokens: int
    output_tokens: int
    output_tokens_per_s: float
    tokens_per_chunk: float
    uncounted: int  # ok requests whose tokens the server did not count: their chunks count instead
    spreads: dict[str, Spread]  # ttft, itl (every gap between chunks), tpot, e2e
    failures: dict[str, Failure]  # by kind
    goodput: Goodput | None
    own_delay: OwnDelay
    requests: tuple[RequestTimes, ...]


def report_of(
    targets: tuple[Target, ...],
    records: Sequence[Record],
    *,
    began: float,
    until: float,
    last_due: float | None,
    not_sent: int,
    peak_in_flight: int,
    own_delay: OwnDelay,
) -> LoadReport:
    """Computes the report of `records`. `began` and `until` are times on their clock.

    So is `last_due`, the time of the last arrival in an open loop; None in a closed one."""
    done = [record for record in records if record.ok]
    failed = [record for record in records if record.failure is not None]
    measured = [record.measures() for record in done]
    samples = {
        name: [value for one in measured if (value := one[name]) is not None] for name in ("ttft", "tpot", "e2e")
    }
    samples["itl"] = [1000 * gap for record in done for gap in record.gaps]
    duration_s, offered = until - began, len(records) + not_sent
    good = sum(meets(one, targets) for one in measured)
    output_tokens, chunks = sum(record.output_tokens for record in done), sum(record.chunks for record in done)
    return LoadReport(
        offered=offered,
        ok=len(done),
        failed=len(failed),
        not_sent=not_sent,
        unfinished=len(records) - len(done) - len(failed),
        empty=sum(not record.chunks for record in done),
        peak_in_flight=peak_in_flight,
        duration_s=duration_s,
        offered_per_s=None if last_due is None else _rate(offered - 1, last_due - records[0].due),
        ok_per_s=_rate(len(done), duration_s),
        prompt_tokens=sum(record.prompt_tokens for record in done),
        output_tokens=output_tokens,
        output_tokens_per_s=_rate(output_tokens, duration_s),
        tokens_per_chunk=output_tokens / chunks if chunks else 0.0,
        uncounted=sum(not record.counted for record in done),
        spreads={name: spread(samples[name]) for name in MEASURES if samples[name]},
        failures={
            kind: Failure(count, next(record.message for record in failed if record.failure == kind))
            for kind, count in Counter(record.failure or "" for record in failed).most_common()
        },
        goodput=Goodput(targets, good / offered, _rate(good, duration_s)) if targets else None,
        own_delay=own_delay,
        requests=tuple(_times(record, began) for record in records),
    )


def spread(samples: Sequence[float]) -> Spread:
    """Returns mean, percentiles and maximum of at least one sample."""
    ordered = sorted(samples)
    p50, p90, p99 = (percentile(ordered, percent) for percent in (50, 90, 99))
    return Spread(len(ordered), sum(ordered) / len(ordered), p50, p90, p99, ordered[-1])


def load_lines(report: LoadReport) -> Iterator[str]:
    """Yields the lines of the report: counts, tokens, the table of times, failures, goodput, the generator's own delays."""
    arrived = "" if report.offered_per_s is None else f" at {report.offered_per_s:.2f}/s"
    yield (
        f"requests:  {report.offered} offered{arrived}; {report.ok} ok, {report.failed} failed, "
        f"{report.not_sent} not sent, {report.unfinished} unfinished; at most {report.peak_in_flight} in flight"
    )
    yield (
        f"served:    {report.ok_per_s:.2f} requests/s, {report.output_tokens_per_s:.1f} output tokens/s "
        f"in {report.duration_s:.1f} s"
    )
    yield (
        f"tokens:    {report.prompt_tokens} of prompts, {report.output_tokens} of outputs, "
        f"{report.tokens_per_chunk:.2f} a chunk"
    )
    if report.spreads:
        rows = [
            (f"{name.upper()} ms", *(f"{value:.1f}" for value in (one.mean, one.p50, one.p90, one.p99, one.max)))
            for name, one in report.spreads.items()
        ]
        yield from table(("", "mean", "p50", "p90", "p99", "max"), rows)
    for kind, failure in report.failures.items():
        yield f"failed:    {failure.count} x {kind}; the first of them: {failure.message}"
    if report.empty:
        yield f"empty:     {report.empty} answers had no output, so they have no TTFT"
    if report.uncounted:
        yield f"uncounted: the server did not count the tokens of {report.uncounted} answers; their chunks count instead"
    if report.goodput is not None:
        wanted = ", ".join(f"{target.measure.upper()} ≤ {target.ms:g} ms" for target in report.goodput.targets)
        yield f"goodput:   {report.goodput.fraction:.3f} of the requests, {report.goodput.per_s:.2f}/s: {wanted}"
    own = report.own_delay
    sent = "" if own.sent_late_p99_ms is None else f"p99 {own.sent_late_p99_ms:.1f} ms late to send, "
    yield f"generator: {sent}p99 {own.loop_delay_p99_ms:.1f} ms late to read, {100 * own.cpu_fraction:.0f} % of a core"
    if own.bottleneck is not None:
        yield f"WARNING:   the generator itself was slow, so these times are not the server's alone: {own.bottleneck}"


def load_json(report: LoadReport) -> dict[str, Any]:
    """Returns the report as JSON, with one object per request."""
    return asdict(report)


def _times(record: Record, began: float) -> RequestTimes:
    measures = record.measures() if record.ok else {"ttft": None, "e2e": None}
    return RequestTimes(
        due_ms=1000 * (record.due - began),
        sent_late_ms=1000 * (record.sent - record.due) if record.sent else 0.0,
        ttft_ms=measures["ttft"],
        e2e_ms=measures["e2e"],
        prompt_tokens=record.prompt_tokens,
        output_tokens=record.output_tokens,
        failure=record.failure,
    )


def _rate(count: float, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
