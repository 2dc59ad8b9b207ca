"""Runs faults one after another under load, and judges each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from moiety.client import Client
from moiety.errors import FailedPrecondition, MoietyError, Unavailable
from moiety.tools.chaos.fault import DidNotHold, Kind, System
from moiety.tools.chaos.load import Load, Tally
from moiety.tools.chaos.meters import Leaks, leaks, read_usage
from moiety.tools.chaos.schedule import Planned

Progress = Callable[[str], None]
START_S = 60.0  # longest wait for streams to begin
WARM_ROUNDS = 2  # of every stream, before the first trial
MOST_SKIPPED = 1000  # faults in a row: then no kind is left that can happen


@dataclass(frozen=True, slots=True)
class Trial:
    """One fault and what became of the requests under it."""

    kind: Kind
    what: str  # was done
    tally: Tally
    leaks: Leaks | None  # None if the system could not be measured
    broken: tuple[str, ...]  # what did not hold; empty if all did


@dataclass(frozen=True, slots=True)
class Outcome:
    """All trials of a run."""

    quiet: Tally  # the same streams without a fault
    trials: tuple[Trial, ...]
    skipped: dict[str, str]  # kind -> why this machine or system cannot have it
    leaks: Leaks | None  # what all trials together left behind; None if the system could not be measured

    @property
    def passed(self) -> bool:
        """Whether there was a trial, everything held in each, and all together left no more behind than one may."""
        clean = self.leaks is not None and not self.leaks.excess
        return bool(self.trials) and clean and not any(trial.broken for trial in self.trials)


async def run_trials(
    system: System,
    planned: Iterator[Planned],
    *,
    faults: int | None,
    seconds: float | None,
    slack: float,
    say: Progress,
) -> Outcome:
    """Runs trials until `faults` faults of the schedule have had their turn or `seconds` have passed.

    A fault that cannot happen here has its turn, too: a seed means the same faults on every machine. `slack` multiplies
    every bound of a gap.

    Raises the error of a request that fails before the first fault.
    """
    began = time.monotonic()
    # A stopped gateway must be noticed within the gap that its trial allows.
    async with Client(system.address, ping_every_s=0.5, ping_timeout_s=1.0, connect_timeout_s=1.0) as client:
        load = Load(client)
        say("quiet: learning the tokens of every stream")
        for _ in range(WARM_ROUNDS):
            await load.learn()
        quiet = await load.learn()
        say(f"quiet: {quiet.tokens_per_s:.0f} tokens/s, worst gap {quiet.worst_gap_s:.2f} s")
        first = await read_usage(system)
        trials: list[Trial] = []
        skipped: dict[str, str] = {}
        idle = 0  # faults in a row that cannot happen here
        for count, plan in enumerate(planned):
            late = seconds is not None and time.monotonic() - began >= seconds
            if late or count == faults or idle == MOST_SKIPPED:
                break
            if plan.kind.name in skipped:
                idle += 1
                continue
            try:
                trial = await _trial(system, load, plan, slack)
            except FailedPrecondition as error:
                skipped[plan.kind.name] = str(error)
                say(f"{plan.kind.name}: skipped, {error}")
                await system.repair()
                continue
            idle = 0
            trials.append(trial)
            say(line_of(trial))
            if any(text.startswith("not whole") for text in trial.broken):
                say("the system cannot be repaired: the run ends")
                return Outcome(quiet, tuple(trials), skipped, None)
        return Outcome(quiet, tuple(trials), skipped, leaks(first, await read_usage(system)))


def line_of(trial: Trial) -> str:
    """Returns what a trial showed, as one line."""
    tally = trial.tally
    counts = f"{tally.identical} of {tally.requests} identical, {tally.failed} failed, gap {tally.worst_gap_s:.2f} s"
    verdict = "" if not trial.broken else "  DID NOT HOLD: " + "; ".join(trial.broken)
    return f"{trial.kind.name}: {trial.what}: {counts}{verdict}"


async def _trial(system: System, load: Load, plan: Planned, slack: float) -> Trial:
    kind, broken = plan.kind, list[str]()
    before = await read_usage(system)
    what = ""
    tally = Tally()
    try:
        async with load.running() as tally:
            await load.until(plan.strike_at, START_S)
            try:
                async with kind.cause(system, Random(plan.seed)) as what:
                    await asyncio.sleep(kind.lasts_s)
            except (DidNotHold, OSError) as error:
                broken.append(str(error) or f"the fault could not be caused: {type(error).__name__}")
    except (TimeoutError, MoietyError) as error:
        if isinstance(error, FailedPrecondition):
            raise
        broken.append(str(error) or "streams did not begin in time")
    broken = [*_judged(kind, tally, slack), *broken]
    left: Leaks | None = None
    try:
        await system.repair()
        later = await load.check()
        broken += [f"afterwards {problem}" for problem in _judged(kind, later, slack)]
        left = leaks(before, await read_usage(system))
        broken += left.excess
    except (TimeoutError, MoietyError) as error:
        broken.append(f"not whole again: {error or 'services are missing'}")
    return Trial(kind, what, tally, left, tuple(broken))


def _judged(kind: Kind, tally: Tally, slack: float) -> Iterator[str]:
    wrong = [error for error in tally.errors if not (kind.may_break and isinstance(error, Unavailable))]
    if wrong:
        yield f"{len(wrong)} requests failed, such as {type(wrong[0]).__name__}: {str(wrong[0])[:160]}"
    if (other := tally.requests - tally.failed - tally.identical) > 0:
        yield f"{other} streams have other tokens, or did not end"
    if tally.worst_gap_s > (bound_s := kind.bound_s * slack):
        yield f"a stream waited {tally.worst_gap_s:.2f} s, at most {bound_s:g} s are allowed"
