"""How many replicas one expert group should have: a pure function of what was seen and of the time passed in.

Growth acts at once, then waits for its replicas to come up; shrinking waits for load to stay low and goes one by one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moiety.config import GroupSettings

STEP_TIMEOUT_S = 30.0  # a replica that is not live by then no longer holds up the next step
SETTLE_S = 1.5  # load reports of the time before a step have left their window by then
SHRINK_MARGIN = 0.8  # after a step down, predicted busy must stay below this fraction of the target
ROUNDING = 1e-9  # keeps float noise (0.6 / 0.2 = 2.9999…96) from asking for one replica more


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What is known of one deployment at one moment."""

    deployment: str
    target: int  # replicas asked for now
    live: int  # replicas that are registered and ready
    reporting: int  # of these, how many told their load lately
    busy: float  # mean busy fraction of the reporting replicas, 0 to 1
    queue_wait_ms: float  # the longest mean wait for the device among them
    rows_per_s: float  # rows the routers send to the experts it holds
    wake: bool = False  # someone waits for an expert that it holds and no live replica does
    stale: bool = False  # the registry does not answer: nothing here can be trusted but `target`


@dataclass(frozen=True, slots=True)
class State:
    """What must be remembered of one deployment from one decision to the next. Times are those of `now`, in seconds."""

    short_since: float | None = None  # fewer replicas live than asked for, since then
    settled_at: float = -math.inf  # until then, load reports may still tell of the time before the last step
    low_since: float | None = None  # one replica less would have done, since then


@dataclass(frozen=True, slots=True)
class Decision:
    """The replicas to ask for, why, and the numbers the reason rests on."""

    deployment: str
    current: int
    target: int
    reason: str
    inputs: Mapping[str, float | int | bool]
    state: State

    @property
    def changes(self) -> bool:
        return self.target != self.current


def decide(snapshot: Snapshot, state: State, settings: GroupSettings, now: float) -> Decision:
    """The next target of `snapshot.deployment`, within `[min_replicas, max_replicas]`.

    1. The registry is silent: hold.      2. Out of bounds: go to the bound.      3. At zero: wake on demand.
    4. Still growing: wait, up to STEP_TIMEOUT_S.      5. Too busy or too long a queue: grow at once.
    6. Low for `shrink_after_s`: one replica less.      7. Otherwise hold.
    """
    if snapshot.stale:
        return _decision(snapshot, replace(state, low_since=None), snapshot.target, "the registry does not answer")
    state = _observe(snapshot, state, now)
    low, high = settings.min_replicas, max(settings.max_replicas, settings.min_replicas)
    if not low <= snapshot.target <= high:
        target = min(max(snapshot.target, low), high)
        return _step(snapshot, state, target, f"bounds are {low} to {high}", now)
    if snapshot.target == 0:
        return _at_zero(snapshot, state, now)
    growing = state.short_since is not None and now - state.short_since < STEP_TIMEOUT_S
    if growing:
        return _decision(snapshot, replace(state, low_since=None), snapshot.target, _coming(snapshot))
    if snapshot.reporting == 0:
        return _decision(snapshot, replace(state, low_since=None), snapshot.target, "no replica reports its load")
    wanted, why = _wanted(snapshot, settings)
    if wanted > snapshot.target:
        return _grow(snapshot, replace(state, low_since=None), min(wanted, high), why, now)
    return _shrink(snapshot, state, settings, now)


def _observe(snapshot: Snapshot, state: State, now: float) -> State:
    """Keeps track of whether the replicas asked for are live."""
    if snapshot.live < snapshot.target:
        return replace(state, short_since=now if state.short_since is None else state.short_since)
    if state.short_since is not None:
        return replace(state, short_since=None, settled_at=now + SETTLE_S)
    return state


def _at_zero(snapshot: Snapshot, state: State, now: float) -> Decision:
    if snapshot.wake:
        return _step(snapshot, state, 1, "its experts are waited for", now)
    if snapshot.rows_per_s > 0:
        return _step(snapshot, state, 1, f"{snapshot.rows_per_s:.0f} rows/s for its experts", now)
    return _decision(snapshot, state, 0, "no demand")


def _wanted(snapshot: Snapshot, settings: GroupSettings) -> tuple[int, str]:
    """Replicas that the load of the live ones calls for, and the words for it."""
    wanted, why = 0, ""
    if snapshot.busy > settings.target_busy:
        wanted = math.ceil(snapshot.live * snapshot.busy / settings.target_busy - ROUNDING)
        why = f"busy {snapshot.busy:.2f} of {_replicas(snapshot.live)} > target {settings.target_busy:.2f}"
    if snapshot.queue_wait_ms > settings.queue_wait_ms and wanted <= snapshot.target:
        wanted = snapshot.target + 1
        why = f"queue wait {snapshot.queue_wait_ms:.0f} ms > limit {settings.queue_wait_ms:.0f} ms"
    return wanted, why


def _grow(snapshot: Snapshot, state: State, target: int, why: str, now: float) -> Decision:
    if target == snapshot.target:
        return _decision(snapshot, state, target, f"{why}, but max_replicas is {target}")
    if now < state.settled_at:
        return _decision(snapshot, state, snapshot.target, f"{why}, but the last step has just come up")
    return _step(snapshot, state, target, why, now)


def _shrink(snapshot: Snapshot, state: State, settings: GroupSettings, now: float) -> Decision:
    fewer = snapshot.target - 1
    if fewer < settings.min_replicas:
        return _decision(snapshot, replace(state, low_since=None), snapshot.target, "within bounds and load")
    low, why = _low(snapshot, settings, fewer)
    if not low:
        return _decision(snapshot, replace(state, low_since=None), snapshot.target, why)
    since = now if state.low_since is None else state.low_since
    state = replace(state, low_since=since)
    if now - since < settings.shrink_after_s:
        return _decision(snapshot, state, snapshot.target, f"{why}; for {now - since:.0f} s so far")
    return _step(snapshot, state, fewer, f"{why} for {now - since:.0f} s", now)


def _low(snapshot: Snapshot, settings: GroupSettings, fewer: int) -> tuple[bool, str]:
    """Whether `fewer` replicas would carry this load with a margin, and the words for it."""
    if snapshot.reporting < snapshot.live:
        return False, f"only {snapshot.reporting} of {_replicas(snapshot.live)} report their load"
    if fewer == 0:
        idle = not snapshot.wake and snapshot.rows_per_s == 0
        return idle, "no demand" if idle else f"last replica, {snapshot.rows_per_s:.0f} rows/s"
    predicted = snapshot.busy * snapshot.live / min(fewer, snapshot.live)
    bound = SHRINK_MARGIN * settings.target_busy
    calm = snapshot.queue_wait_ms <= settings.queue_wait_ms / 2
    text = f"busy {snapshot.busy:.2f} of {_replicas(snapshot.live)}, {predicted:.2f} on {fewer}"
    if not calm:
        return False, f"{text}, but queue wait {snapshot.queue_wait_ms:.0f} ms"
    if predicted >= bound:
        return False, f"{text} ≥ {bound:.2f}"
    return True, f"{text} < {bound:.2f}"


def _step(snapshot: Snapshot, state: State, target: int, why: str, now: float) -> Decision:
    state = replace(state, low_since=None, short_since=now if target > snapshot.live else None)
    return _decision(snapshot, state, target, why)


def _decision(snapshot: Snapshot, state: State, target: int, why: str) -> Decision:
    current = snapshot.target
    move = f"{current} → {target}" if target != current else f"stay at {current}"
    inputs = {
        "target": current,
        "live": snapshot.live,
        "reporting": snapshot.reporting,
        "busy": round(snapshot.busy, 4),
        "queue_wait_ms": round(snapshot.queue_wait_ms, 3),
        "rows_per_s": round(snapshot.rows_per_s, 3),
        "wake": snapshot.wake,
        "stale": snapshot.stale,
    }
    return Decision(snapshot.deployment, current, target, f"{why}: {move}", inputs, state)


def _coming(snapshot: Snapshot) -> str:
    return f"{snapshot.live} of {_replicas(snapshot.target)} live"


def _replicas(count: int) -> str:
    return f"{count} replica" if count == 1 else f"{count} replicas"
