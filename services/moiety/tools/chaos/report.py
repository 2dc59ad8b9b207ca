"""The table of a run: one row per kind of fault."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moiety.tools.chaos.trials import Outcome, Trial

HEADER = (
    "fault",
    "trials",
    "requests",
    "failed",
    "identical",
    "worst gap s",
    "bound s",
    "tokens/s lost",
    "left behind",
)


@dataclass(frozen=True, slots=True)
class Row:
    """All trials of one kind: sums, the worst gap, and the most that one trial left behind."""

    fault: str
    trials: int
    requests: int
    failed: int
    identical: int
    worst_gap_s: float
    bound_s: float
    lost: float  # fraction of the quiet run's tokens per second
    left_behind: str
    broken: tuple[str, ...]

    @property
    def cells(self) -> tuple[str, ...]:
        """The cells of the row, as HEADER names them."""
        numbers = (self.trials, self.requests, self.failed, self.identical)
        verdict = "" if not self.broken else "  DID NOT HOLD"
        return (
            self.fault,
            *map(str, numbers),
            f"{self.worst_gap_s:.2f}",
            f"{self.bound_s:g}",
            f"{100 * self.lost:.0f} %",
            self.left_behind + verdict,
        )


def rows_of(outcome: Outcome, slack: float) -> list[Row]:
    """Returns one row per kind, in the order in which the kinds were first tried."""
    by_kind: dict[str, list[Trial]] = {}
    for trial in outcome.trials:
        by_kind.setdefault(trial.kind.name, []).append(trial)
    return [_row(name, trials, outcome.quiet.tokens_per_s, slack) for name, trials in by_kind.items()]


def _row(name: str, trials: Sequence[Trial], quiet_tokens_per_s: float, slack: float) -> Row:
    tallies = [trial.tally for trial in trials]
    seconds = sum(tally.seconds for tally in tallies)
    pace = sum(tally.tokens for tally in tallies) / seconds if seconds else 0.0
    measured = [trial.leaks for trial in trials if trial.leaks is not None]
    worst = max(measured, key=lambda left: (len(left.excess), left.rss_mib), default=None)
    return Row(
        fault=name,
        trials=len(trials),
        requests=sum(tally.requests for tally in tallies),
        failed=sum(tally.failed for tally in tallies),
        identical=sum(tally.identical for tally in tallies),
        worst_gap_s=max(tally.worst_gap_s for tally in tallies),
        bound_s=trials[0].kind.bound_s * slack,
        lost=max(0.0, 1 - pace / quiet_tokens_per_s) if quiet_tokens_per_s else 0.0,
        left_behind=str(worst) if worst is not None else "not measured",
        broken=tuple(text for trial in trials for text in trial.broken),
    )
