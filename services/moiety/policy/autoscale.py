"""Decides how many replicas one deployment should have: a pure function of a snapshot, a state and the time.

Growth acts at once and aims at a busy fraction. Shrinking waits until load has stayed low and takes small steps. The cost
model predicts the effect of one replica more or less. Experts, routers and gateways follow the same policy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from moiety.config.options import Scaling

# A replica that is not live after this time, or after this many times its deployment's longest start, no longer delays
# the next step.
LEAST_PATIENCE_S = 30.0
MOST_PATIENCE_S = 3600.0  # starts are measured by wall clocks, which may jump
PATIENCE = 2.0
SETTLE_S = 1.5  # after this time, the load reports from before a step have left their window
SHRINK_STEP = 0.1  # fraction of the replicas that one step removes (at least one replica)
LEAST_GAIN = 0.1  # growth must promise this: doubling the replicas relieves each by at least this fraction
JUDGED = 0.2  # a step is judged only if it should have relieved each replica by this fraction: less is lost in noise
ALIVE_SHARE = 0.25  # fraction of target_busy: a hot set whose one replica is less busy than this is not worth it
ROUNDING = 1e-9  # keeps float noise (0.6 / 0.2 = 2.9999…96) from adding a replica


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What is known of one deployment at one moment."""

    deployment: str
    target: int  # replicas requested now
    live: int  # replicas that are registered and ready
    reporting: int  # live replicas that reported their load lately
    busy: float  # mean busy fraction of the reporting replicas, 0 to 1
    queue_wait_ms: float  # the longest mean wait for the device among the reporting replicas
    rows_per_s: float  # rows that routers send to the experts it holds; for a router or gateway, its requests
    missing_experts: bool = False  # requests or a starting router wait for an expert that it holds
    stale: bool = False  # the registry does not answer or refuses writes: only `target` can be trusted
    fixed: float = 0.0  # part of busy that stays when more replicas share the work, 0 to 1: KernelCost.fixed_share
    spare: bool = False  # a hot set: other deployments hold all its experts too
    busy_if_added: float = 0.0  # for a hot set: the busy fraction that one more holder of its experts would have
    start_s: float = 0.0  # the longest start among its live replicas, from launch to registration; 0 = unknown


@dataclass(frozen=True, slots=True)
class Trial:
    """The state before a step up, kept to judge whether the step helped."""

    live: int
    target: int
    measure: str  # "busy" or "queue wait": the measure that was too high
    per_row: float  # that measure divided by rows per second


@dataclass(frozen=True, slots=True)
class State:
    """What one deployment's next decision needs from the last one. Times are values of `now`, in seconds."""

    starting_since: float | None = None  # since when fewer replicas are live than requested
    start_s: float = 0.0  # how long it took until the replicas requested were live: the longest time of late
    settled_at: float = -math.inf  # until then, load reports may still cover the time before the last step
    low_since: float | None = None  # since when fewer replicas would be enough
    live: int | None = None  # live replicas at the last decision
    trial: Trial | None = None  # the last step up, until it can be judged
    doubted_until: float = -math.inf  # no step up before then, because the last one did not help
    growth_failure: str = ""  # the numbers that show that it did not help


@dataclass(frozen=True, slots=True)
class Decision:
    """The number of replicas to request, the reason, and the numbers behind it."""

    deployment: str
    current: int
    target: int
    reason: str
    inputs: Mapping[str, float | int | bool]
    state: State

    @property
    def changes(self) -> bool:
        return self.target != self.current


def decide(snapshot: Snapshot, state: State, settings: Scaling, now: float) -> Decision:
    """Decides how many replicas `snapshot.deployment` should have, within `[min_replicas, max_replicas]`.

    1. The registry cannot be trusted: hold.      2. Out of bounds: go to the bound.      3. At zero: start one on demand.
    4. No replica reports its load: hold.
    5. Too busy, even counting the replicas that are still starting, or the queue is too long: grow at once, unless replicas
       have just become live, growth would not help, or the last step up did not help.
    6. Still growing: wait, as long as `patience_s` says.
    7. Load low for `shrink_after_s`: remove up to a tenth of the replicas, at least one.      8. Otherwise hold.
    """
    if snapshot.stale:
        why = "the registry does not answer, or refuses writes"
        return _decision(snapshot, replace(state, low_since=None), snapshot.target, why)
    state = _observe(snapshot, state, settings, now)
    low, high = settings.min_replicas, max(settings.max_replicas, settings.min_replicas)
    if not low <= snapshot.target <= high:
        target = min(max(snapshot.target, low), high)
        return _step(snapshot, state, target, f"bounds are {low} to {high}", now)
    if snapshot.target == 0:
        return _at_zero(snapshot, state, settings, now)
    growing = state.starting_since is not None and now - state.starting_since < patience_s(snapshot, state)
    if snapshot.reporting == 0:
        why = _coming(snapshot) if growing else "no replica reports its load"
        return _decision(snapshot, replace(state, low_since=None), snapshot.target, why)
    wanted, why, measure = _wanted(snapshot, settings, growing)
    if wanted > snapshot.target:
        return _grow(snapshot, replace(state, low_since=None), min(wanted, high), why, measure, now)
    if growing:
        return _decision(snapshot, replace(state, low_since=None), snapshot.target, _coming(snapshot))
    return _shrink(snapshot, state, settings, now)


def predicted_busy(snapshot: Snapshot, replicas: int) -> float:
    """Predicts the mean busy fraction of `replicas` (at least 1) under the current load.

    More replicas reduce only the part of the busy fraction that is not `snapshot.fixed`.
    """
    return snapshot.busy * (snapshot.fixed + (1.0 - snapshot.fixed) * snapshot.live / replicas)


def patience_s(snapshot: Snapshot, state: State) -> float:
    """Returns how many seconds to wait for replicas that start, before deciding as if they would not come."""
    return min(max(LEAST_PATIENCE_S, PATIENCE * max(snapshot.start_s, state.start_s)), MOST_PATIENCE_S)


def router_busy(running: int, slots: int, used_blocks: int, blocks: int) -> float:
    """Returns how full a router is, 0 to 1: its slots or its KV blocks, whichever is scarcer. Cached prefixes count as free."""
    return max(running / max(slots, 1), used_blocks / max(blocks, 1))


def _observe(snapshot: Snapshot, state: State, settings: Scaling, now: float) -> State:
    """Tracks whether the requested replicas are live, and judges the last step up."""
    arrived = state.live is not None and snapshot.live > state.live
    state = replace(state, live=snapshot.live, settled_at=now + SETTLE_S if arrived else state.settled_at)
    if snapshot.live < snapshot.target:
        return replace(state, starting_since=now if state.starting_since is None else state.starting_since)
    if state.starting_since is not None:
        start_s = max(now - state.starting_since, state.start_s / 2)  # others soon make a single slow start forgotten
        state = replace(state, starting_since=None, start_s=start_s, settled_at=now + SETTLE_S)
    if state.trial is not None and now >= state.settled_at and snapshot.reporting == snapshot.live:
        return _judge(snapshot, state, state.trial, settings, now)
    return state


def _judge(snapshot: Snapshot, state: State, trial: Trial, settings: Scaling, now: float) -> State:
    """Ends the trial of a step up. If the step brought less than a fifth of the expected relief, growth pauses."""
    state = replace(state, trial=None)
    expected = 1.0 - trial.live / max(snapshot.live, 1)
    if expected < JUDGED or trial.per_row <= 0.0 or snapshot.rows_per_s <= 0.0:
        return state
    relief = 1.0 - _measured(snapshot, trial.measure) / snapshot.rows_per_s / trial.per_row
    if relief >= 2 * LEAST_GAIN * expected:
        return state
    steps = f"{trial.live} → {snapshot.live} replicas"
    doubt = f"the step {steps} changed {trial.measure} per row by {-relief:+.0%}, expected {-expected:+.0%}"
    pause_s = max(settings.shrink_after_s, patience_s(snapshot, state))
    return replace(state, doubted_until=now + pause_s, growth_failure=doubt)


def _measured(snapshot: Snapshot, measure: str) -> float:
    return snapshot.busy if measure == "busy" else snapshot.queue_wait_ms


def _at_zero(snapshot: Snapshot, state: State, settings: Scaling, now: float) -> Decision:
    if snapshot.missing_experts:
        return _step(snapshot, state, 1, "requests or a starting router wait for its experts", now)
    if snapshot.spare:
        worth = 2 * ALIVE_SHARE * settings.target_busy
        why = f"one replica would be {snapshot.busy_if_added:.2f} busy"
        if snapshot.busy_if_added >= worth:
            return _step(snapshot, state, 1, f"{why} ≥ {worth:.2f}", now)
        return _decision(snapshot, state, 0, f"{why} < {worth:.2f}, and other deployments hold its experts")
    if snapshot.rows_per_s > 0:
        return _step(snapshot, state, 1, f"{snapshot.rows_per_s:.0f} rows/s for its experts", now)
    return _decision(snapshot, state, 0, "no demand")


def _wanted(snapshot: Snapshot, settings: Scaling, growing: bool) -> tuple[int, str, str]:
    """Returns the replicas that the current load needs, the reason, and the measure that is too high ("" if none is)."""
    target, busy = settings.target_busy, snapshot.busy
    text = f"busy {busy:.2f} of {_replicas(snapshot.live)} > target {target:.2f}"
    divisible, per_replica = busy * (1.0 - snapshot.fixed) * snapshot.live, target - busy * snapshot.fixed
    if busy > target and per_replica > 0:
        wanted = min(math.ceil(divisible / per_replica - ROUNDING), 4 * snapshot.target)
        if wanted > snapshot.target:
            return wanted, text, "busy"
    elif busy > target and not growing:
        # No number of replicas reaches the target: double, then judge whether it helped.
        return 2 * snapshot.target, text, "busy"
    if snapshot.queue_wait_ms > settings.queue_wait_ms and not growing:
        why = f"queue wait {snapshot.queue_wait_ms:.0f} ms > limit {settings.queue_wait_ms:.0f} ms"
        return snapshot.target + max(1, int(SHRINK_STEP * snapshot.target)), why, "queue wait"
    return 0, "", ""


def _grow(snapshot: Snapshot, state: State, target: int, why: str, measure: str, now: float) -> Decision:
    if target == snapshot.target:
        return _decision(snapshot, state, target, f"{why}, but max_replicas is {target}")
    if now < state.settled_at:
        return _decision(snapshot, state, snapshot.target, f"{why}, but the last replicas have just become live")
    gain = (1.0 - snapshot.fixed) / 2
    if gain < LEAST_GAIN:
        small = (
            f"but {snapshot.fixed:.0%} of it is fixed per batch: twice the replicas would relieve each by {gain:.0%}"
        )
        return _decision(snapshot, state, snapshot.target, f"{why}, {small}")
    if now < state.doubted_until:
        return _decision(snapshot, state, snapshot.target, f"{why}, but {state.growth_failure}")
    per_row = _measured(snapshot, measure) / snapshot.rows_per_s if snapshot.rows_per_s > 0 else 0.0
    trial = Trial(max(snapshot.live, 1), target, measure, per_row)
    return _step(snapshot, replace(state, trial=trial), target, why, now)


def _shrink(snapshot: Snapshot, state: State, settings: Scaling, now: float) -> Decision:
    fewest = max(settings.min_replicas, snapshot.target - max(1, int(SHRINK_STEP * snapshot.target)))
    if fewest >= snapshot.target:
        return _decision(snapshot, replace(state, low_since=None), snapshot.target, "within bounds and load")
    for fewer in range(fewest, snapshot.target):
        low, why = _low(snapshot, settings, fewer)
        if low:
            break
    else:
        return _decision(snapshot, replace(state, low_since=None), snapshot.target, why)
    since = now if state.low_since is None else state.low_since
    state = replace(state, low_since=since)
    if now - since < settings.shrink_after_s:
        return _decision(snapshot, state, snapshot.target, f"{why}; for {now - since:.0f} s so far")
    return _step(snapshot, replace(state, trial=None), fewer, f"{why} for {now - since:.0f} s", now)


def _low(snapshot: Snapshot, settings: Scaling, fewer: int) -> tuple[bool, str]:
    """Returns whether `fewer` replicas would carry this load with a margin, and the reason."""
    if snapshot.reporting < snapshot.live:
        return False, f"only {snapshot.reporting} of {_replicas(snapshot.live)} report their load"
    if fewer == 0 and snapshot.spare:
        bound = ALIVE_SHARE * settings.target_busy
        text = f"busy {snapshot.busy:.2f} of the last replica"
        if snapshot.missing_experts or snapshot.busy >= bound:
            return False, f"{text} ≥ {bound:.2f}"
        return True, f"{text} < {bound:.2f}, and other deployments hold its experts"
    if fewer == 0:
        idle = not snapshot.missing_experts and snapshot.rows_per_s == 0
        return idle, "no demand" if idle else f"last replica, {snapshot.rows_per_s:.0f} rows/s"
    predicted = predicted_busy(snapshot, min(fewer, snapshot.live))
    bound = settings.shrink_margin * settings.target_busy
    calm = snapshot.queue_wait_ms <= settings.queue_wait_ms / 2
    text = f"busy {snapshot.busy:.2f} of {_replicas(snapshot.live)}, {predicted:.2f} on {fewer}"
    if not calm:
        return False, f"{text}, but queue wait {snapshot.queue_wait_ms:.0f} ms"
    if predicted >= bound:
        return False, f"{text} ≥ {bound:.2f}"
    return True, f"{text} < {bound:.2f}"


def _step(snapshot: Snapshot, state: State, target: int, why: str, now: float) -> Decision:
    state = replace(state, low_since=None, starting_since=now if target > snapshot.live else None)
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
        "missing_experts": snapshot.missing_experts,
        "stale": snapshot.stale,
        "fixed": round(snapshot.fixed, 4),
        "spare": snapshot.spare,
        "busy_if_added": round(snapshot.busy_if_added, 4),
        "start_s": round(snapshot.start_s, 1),
    }
    return Decision(snapshot.deployment, current, target, f"{why}: {move}", inputs, state)


def _coming(snapshot: Snapshot) -> str:
    return f"{snapshot.live} of {_replicas(snapshot.target)} live"


def _replicas(count: int) -> str:
    return f"{count} replica" if count == 1 else f"{count} replicas"
