"""The systems that are compared on one trace: elastic groups with hot sets, and what else one could run.

All run the same replicas on the same devices: one holds one group's experts in every layer. Device-hours are those of
expert replicas, from the decision that starts one to the decision that ends it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from moiety.config import GroupSettings
from moiety.core import ExpertSet, Placement
from moiety.policy.autoscale import Decision, Snapshot, State, decide
from moiety.policy.cost import CostModel, Sample, heat, update
from moiety.policy.placement import Room, held_table, plan
from moiety.simulate.flow import Flow, Holding, Work, flow, percentile, work
from moiety.simulate.scenario import Cluster, Floats, Trace, inclusion, popularity

Bools = npt.NDArray[np.bool_]

LOOK_S = 120.0  # how often popularity is sampled from the trace: topics drift over hours
REPLAN_S = 300.0
REPLAN_GAIN = 0.03  # of the critical path: less is not worth moving experts
SAMPLED = 360  # time steps at which step times of baselines are computed; their busy fractions are computed at all
SETTINGS = GroupSettings(min_replicas=1, max_replicas=1000, target_busy=0.7, shrink_after_s=60.0, shrink_margin=0.95)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One system on one trace."""

    system: str
    gpu_hours: float
    p50_ms: float  # of a decode step, over all tokens
    p99_ms: float
    delayed: float  # fraction of tokens that found every router waiting for a full replica
    times_s: Floats = field(repr=False)
    replicas: Floats = field(repr=False)  # that are paid for, over time
    decisions: tuple[tuple[float, Decision], ...] = field(default=(), repr=False)
    rebalances: int = 0
    moved_bytes: float = 0.0


@dataclass(slots=True)
class Load:
    """What a trace asks of a cluster, computed once: inclusion probabilities, and the work of placements."""

    cluster: Cluster
    trace: Trace
    _included: dict[int, Floats] = field(default_factory=dict)

    def included(self, time_s: float) -> Floats:
        """[L, E] at `time_s`."""
        look = int(time_s // LOOK_S) if self.trace.drift else 0
        if look not in self._included:
            popular = popularity(self.trace, self.cluster, look * LOOK_S)
            self._included[look] = inclusion(popular, self.cluster.top_k)
        return self._included[look]


def default_rooms(cluster: Cluster, hot_sets: int) -> list[Room]:
    """The cluster's groups, and hot sets with as much memory."""
    groups = [Room(f"experts-{index}", cluster.room) for index in range(cluster.groups)]
    return groups + [Room(f"hot-{index}", cluster.room, hot=True) for index in range(hot_sets)]


def default_placement(cluster: Cluster) -> Placement:
    """Contiguous experts in every group, nothing in hot sets: what `ModelShape.partition` gives."""
    even = np.ones((cluster.layers, cluster.experts))
    held = np.arange(cluster.experts) * cluster.groups // cluster.experts
    start = {
        f"experts-{group}": ExpertSet.block(cluster.layers, np.flatnonzero(held == group).tolist())
        for group in range(cluster.groups)
    }
    return plan(even, default_rooms(cluster, 0), Placement(0, start)).placement


def elastic(load: Load, settings: GroupSettings = SETTINGS, hot_sets: int | None = None) -> Outcome:
    """Every group and hot set scaled by `policy.autoscale`, experts placed by `policy.placement`, costs by `policy.cost`.

    Each sees what was measured a time step ago. Replicas come `start_s` after they are asked for; experts move as fast as
    replicas read them, and serve from where they were until then.
    """
    cluster, trace = load.cluster, load.trace
    hot_sets = cluster.hot_sets if hot_sets is None else hot_sets
    rooms, placement = default_rooms(cluster, hot_sets), default_placement(cluster)
    costs = _learned(cluster, trace.seed)
    held = _held(cluster, rooms, placement)
    first = work(cluster, load.included(0.0), held, np.ones(len(rooms)))
    needed = first.device_s * trace.rates[0] / cluster.batch / settings.target_busy
    pools = [
        _Pool(room.deployment, settings if not room.hot else _spare(settings), int(np.ceil(count)), room.hot)
        for room, count in zip(rooms, needed, strict=True)
    ]
    recorder, decisions = _Recorder(trace), list[tuple[float, Decision]]()
    seen: Flow | None = None
    asked = first
    smooth: Floats | None = None
    stride = max(1, len(trace.rates) // (4 * SAMPLED))
    next_plan, coming, ready_at, rebalances, moved = 0.0, None, 0.0, 0, 0.0
    for index, rate in enumerate(trace.rates):
        now = index * trace.step_s
        if seen is not None:
            for deployment, pool in enumerate(pools):
                decision = pool.decide(now, cluster, trace, costs, asked, seen, deployment)
                if decision.changes:
                    decisions.append((now, decision))
        live = np.array([float(pool.live(now, cluster.start_s)) for pool in pools])
        included = load.included(now)
        if coming is not None and now >= ready_at:
            placement, held, coming = coming, _held(cluster, rooms, coming), None
        asked = work(cluster, included, held, live)
        offered = rate + recorder.backlog / trace.step_s
        seen = flow(cluster, asked, live, offered, steps_too=index % stride == 0)
        recorder.add(seen, sum(pool.target for pool in pools), rate)
        hot = _measured_heat(cluster, costs, included, seen.served)
        smooth = hot if smooth is None else smooth + min(1.0, trace.step_s / 60) * (hot - smooth)
        if now >= next_plan and coming is None:
            next_plan = now + REPLAN_S
            sized = [replace(room, replicas=max(pool.target, 1)) for room, pool in zip(rooms, pools, strict=True)]
            planned = plan(smooth, sized, placement, cluster.expert_bytes)
            if planned.changes and planned.gain > REPLAN_GAIN:
                most = max(map(len, planned.loads.values()), default=0) * cluster.expert_bytes
                coming, ready_at = planned.placement, now + most / cluster.read_bytes_per_s
                rebalances, moved = rebalances + 1, moved + planned.moved_bytes
    return recorder.outcome("elastic", decisions, rebalances, moved)


def fixed(load: Load, per_group: float, redundancy: float = 0.0, name: str = "static EP") -> Outcome:
    """As many replicas of every group all the time; with `redundancy`, that part of memory more, for copies by the planner.

    Copies follow the load every REPLAN_S, at no cost: EPLB as it is run beside a fixed expert-parallel size.
    """
    cluster, trace = load.cluster, load.trace
    extra = round(cluster.layers * cluster.experts / cluster.groups * redundancy)
    rooms = [replace(room, experts=room.experts + extra) for room in default_rooms(cluster, 0)]
    replicas = np.full(cluster.groups, float(per_group))
    placement = default_placement(cluster)
    held = _held(cluster, rooms, placement)
    costs, recorder, planned_at = _learned(cluster, trace.seed), _Recorder(trace), -np.inf
    stride = max(1, len(trace.rates) // SAMPLED)
    for index in range(0, len(trace.rates), stride):
        now = index * trace.step_s
        included = load.included(now)
        if redundancy and now - planned_at >= REPLAN_S and (trace.drift or index == 0):
            planned_at = now
            placement = plan(_measured_heat(cluster, costs, included, 1.0), rooms, placement).placement
            held = _held(cluster, rooms, placement)
        rates = trace.rates[index : index + stride]
        asked = work(cluster, included, held, replicas)
        seen = flow(cluster, asked, replicas, float(rates.mean()) + recorder.backlog / trace.step_s / stride)
        recorder.add(seen, float(replicas.sum()), float(rates.mean()), stride)
    return recorder.outcome(name)


def whole_engine(load: Load, target_busy: float) -> Outcome:
    """Whole engines, each one replica of every group, come and go by the same policy on the load of their busiest group."""
    cluster, trace = load.cluster, load.trace
    settings = SETTINGS.model_copy(update={"target_busy": target_busy})
    held = _held(cluster, default_rooms(cluster, 0), default_placement(cluster))
    one = np.ones(cluster.groups)
    asked = work(cluster, load.included(0.0), held, one)
    engines = int(np.ceil(asked.device_s.max() * trace.rates[0] / cluster.batch / target_busy))
    pool = _Pool("engines", settings, max(engines, 1), False)
    recorder = _Recorder(trace)
    stride = max(1, len(trace.rates) // SAMPLED)
    seen: Flow | None = None
    for index, rate in enumerate(trace.rates):
        now = index * trace.step_s
        if seen is not None:
            busy = float(seen.busy.max())
            pool.step(Snapshot("engines", pool.target, pool.last_live, pool.last_live, busy, 0.0, rate), now)
        live = pool.live(now, cluster.start_s)
        if index % stride == 0:
            asked = work(cluster, load.included(now), held, one)
        offered = rate + recorder.backlog / trace.step_s
        seen = flow(cluster, asked, one * live, offered, steps_too=index % stride == 0)
        recorder.add(seen, pool.target * cluster.groups, rate)
    return recorder.outcome("whole engines")


def clairvoyant(load: Load, busy: float) -> Outcome:
    """A bound: every group at `busy` at every moment, in fractions of replicas that come and go in no time."""
    cluster, trace = load.cluster, load.trace
    held = _held(cluster, default_rooms(cluster, 0), default_placement(cluster))
    recorder = _Recorder(trace)
    stride = max(1, len(trace.rates) // SAMPLED)
    for index in range(0, len(trace.rates), stride):
        rate = float(trace.rates[index : index + stride].mean())
        asked = work(cluster, load.included(index * trace.step_s), held, np.ones(cluster.groups))
        replicas = asked.device_s * rate / cluster.batch / busy
        recorder.add(flow(cluster, asked, replicas, rate), float(replicas.sum()), rate, stride)
    return recorder.outcome("clairvoyant")


def smallest(run: Callable[[float], Outcome], sizes: Sequence[float], p99_ms: float) -> Outcome:
    """The outcome of the first of ascending `sizes` that meets `p99_ms`, by bisection; the last one's if none does."""
    low, high = 0, len(sizes) - 1
    best = run(sizes[high])
    while low < high:
        middle = (low + high) // 2
        outcome = run(sizes[middle])
        if outcome.p99_ms <= p99_ms:
            best, high = outcome, middle
        else:
            low = middle + 1
    return best


def throughput(cluster: Cluster, included: Floats, p99_ms: float, replicas: int, hot_replicas: int = 0) -> float:
    """Tokens per second that `replicas` serve with steps within `p99_ms`, sized and placed for this load.

    `hot_replicas` of them are hot sets'. Groups get replicas in proportion to their work.
    """
    hot = cluster.hot_sets if hot_replicas else 0
    rooms, placement = default_rooms(cluster, hot), default_placement(cluster)
    sizes = np.full(len(rooms), (replicas - hot_replicas) / cluster.groups)
    sizes[cluster.groups :] = hot_replicas / max(hot, 1)
    held = _held(cluster, rooms, placement)
    for _ in range(4):  # placement and sizes settle on each other
        if hot:
            sized = [replace(room, replicas=max(1, round(size))) for room, size in zip(rooms, sizes, strict=True)]
            measured = _measured_heat(cluster, cluster.cost, included, 1.0)
            held = _held(cluster, rooms, plan(measured, sized, placement).placement)
        asked = work(cluster, included, held, sizes)
        sizes = replicas * asked.device_s / asked.device_s.sum()
    asked = work(cluster, included, held, sizes)
    low, high = 0.0, replicas * cluster.batch / float(asked.device_s.sum())
    for _ in range(30):
        rate = (low + high) / 2
        seen = flow(cluster, asked, sizes, rate)
        good = 1000 * (seen.step_s + 2.3263 * seen.step_sd_s) <= p99_ms and seen.served >= rate
        low, high = (rate, high) if good else (low, rate)
    return low


def _held(cluster: Cluster, rooms: Sequence[Room], placement: Placement) -> Holding:
    return Holding.of(held_table(rooms, placement, cluster.layers, cluster.experts))


def _spare(settings: GroupSettings) -> GroupSettings:
    return settings.model_copy(update={"min_replicas": 0})


def _learned(cluster: Cluster, seed: int) -> CostModel:
    """The cost model as a router has it after 500 replies that are noisy by 10 %."""
    random = np.random.default_rng(seed + 2)
    model = CostModel()
    for _ in range(500):
        experts = random.integers(1, 2 * cluster.experts // cluster.groups)
        weights, rows = float(experts * cluster.expert_bytes), float(experts * random.integers(1, cluster.batch))
        took = cluster.cost.predict(weights, rows) * float(np.exp(0.1 * random.standard_normal()))
        model = update(model, Sample(weights, rows, took))
    return model


def _measured_heat(cluster: Cluster, costs: CostModel, included: Floats, rate: float) -> Floats:
    steps = rate / cluster.batch
    activated = 1 - (1 - included) ** cluster.batch
    return heat(costs, included * rate, activated * steps, cluster.expert_bytes)


@dataclass(slots=True)
class _Pool:
    """The replicas of one deployment: those that are there, those on their way, and the policy's memory."""

    deployment: str
    settings: GroupSettings
    target: int
    spare: bool
    state: State = field(default_factory=State)
    starting: list[float] = field(default_factory=list)  # when each was asked for, oldest first
    last_live: int = 0

    def live(self, now: float, start_s: float) -> int:
        """Replicas that serve at `now`."""
        self.starting = [asked for asked in self.starting if asked + start_s > now]
        self.last_live = self.target - len(self.starting)
        return self.last_live

    def decide(
        self, now: float, cluster: Cluster, trace: Trace, costs: CostModel, asked: Work, seen: Flow, index: int
    ) -> Decision:
        """By what was measured in the last time step."""
        calls = max(float(asked.visits[index].sum()), 1e-9)
        mine = asked.weight_bytes[index].sum() / calls, asked.rows[index].sum() / calls
        steps = seen.served / cluster.batch
        snapshot = Snapshot(
            self.deployment,
            self.target,
            self.last_live,
            self.last_live,
            float(seen.busy[index]) if self.last_live else 0.0,
            1000 * float(seen.wait_s[index]),
            float(asked.rows[index].sum() * steps),
            fixed=0.0,  # a call goes to one replica, whatever their number: replicas share calls, not batches
            spare=self.spare,
            asked=costs.busy(calls * steps, mine[0] * calls * steps, mine[1] * calls * steps),
        )
        return self.step(snapshot, now)

    def step(self, snapshot: Snapshot, now: float) -> Decision:
        """Asks the policy, and does what it says: what is still starting goes first."""
        decision = decide(snapshot, self.state, self.settings, now)
        self.state = decision.state
        more = decision.target - self.target
        if more > 0:
            self.starting += [now] * more
        elif more < 0:
            self.starting = self.starting[: max(0, len(self.starting) + more)]
        self.target = decision.target
        return decision


@dataclass(slots=True)
class _Recorder:
    """Sums up time steps."""

    trace: Trace
    backlog: float = 0.0  # tokens that wait
    _delayed: float = 0.0
    _rows: list[tuple[float, float, float, float]] = field(default_factory=list)  # replicas, mean, sd, tokens

    def add(self, seen: Flow, replicas: float, rate: float, steps: int = 1) -> None:
        """`steps` time steps alike, in which `rate` was offered beside the backlog."""
        seconds = self.trace.step_s * steps
        offered = rate * seconds + self.backlog
        served = min(seen.served * seconds, offered)
        left = offered - served
        if left > 1e-6 * offered:
            self._delayed += min(served, rate * seconds)
        self.backlog = left if left > 1e-6 * offered else 0.0
        self._rows += [(replicas, seen.step_s, seen.step_sd_s, served / steps)] * steps

    def outcome(
        self, system: str, decisions: Sequence[tuple[float, Decision]] = (), rebalances: int = 0, moved: float = 0.0
    ) -> Outcome:
        """Of all steps; tokens of steps with a backlog count as beyond any p99."""
        replicas, means, spreads, tokens = np.array(self._rows).T
        late = self._delayed + self.backlog
        known = ~np.isnan(means)
        means, spreads, weights = means[known], spreads[known], tokens[known] / tokens[known].sum()
        weights *= max(0.0, float(tokens.sum()) - late)
        return Outcome(
            system=system,
            gpu_hours=float(replicas.sum() * self.trace.step_s / 3600),
            p50_ms=1000 * percentile(means, spreads, weights, late, 50),
            p99_ms=1000 * percentile(means, spreads, weights, late, 99),
            delayed=float(late / (tokens.sum() + self.backlog)),
            times_s=np.arange(len(replicas)) * self.trace.step_s,
            replicas=replicas,
            decisions=tuple(decisions),
            rebalances=rebalances,
            moved_bytes=moved,
        )
