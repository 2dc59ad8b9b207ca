"""The replicas of one simulated deployment, scaled by the real policy."""

from __future__ import annotations

from dataclasses import dataclass, field

from moiety.config.options import Scaling
from moiety.policy.autoscale import Decision, Snapshot, State, decide
from moiety.policy.cost_model import KernelCost
from moiety.simulate.flow import StepWork, TimeStep
from moiety.simulate.scenario import Cluster

SETTINGS = Scaling(min_replicas=1, max_replicas=1000, target_busy=0.7, shrink_after_s=60.0, shrink_margin=0.95)


@dataclass(slots=True)
class ReplicaPool:
    """The replicas of one deployment, live and starting, and the policy's state."""

    deployment: str
    settings: Scaling
    target: int
    spare: bool
    state: State = field(default_factory=State)
    starting: list[float] = field(default_factory=list)  # when each starting replica was requested, oldest first
    last_live: int = 0

    def live(self, now: float, start_s: float) -> int:
        """Returns the number of replicas that serve at `now`."""
        self.starting = [requested for requested in self.starting if requested + start_s > now]
        self.last_live = self.target - len(self.starting)
        return self.last_live

    def decide(
        self,
        now: float,
        cluster: Cluster,
        costs: KernelCost,
        step_work: StepWork,
        seen: TimeStep,
        index: int,
    ) -> Decision:
        """Decides the next target by the last time step (`step_work`, `seen`). `index`: this deployment's index in both."""
        calls = max(float(step_work.visits[index].sum()), 1e-9)
        weight_bytes, rows = step_work.weight_bytes[index].sum() / calls, step_work.rows[index].sum() / calls
        steps = seen.served / cluster.batch
        snapshot = Snapshot(
            self.deployment,
            self.target,
            self.last_live,
            self.last_live,
            float(seen.busy[index]) if self.last_live else 0.0,
            1000 * float(seen.wait_s[index]),
            float(step_work.rows[index].sum() * steps),
            fixed=0.0,  # each call goes to one replica: more replicas share the calls, they do not split batches
            spare=self.spare,
            busy_if_added=costs.busy(calls * steps, weight_bytes * calls * steps, rows * calls * steps),
            start_s=cluster.start_s,
        )
        return self.step(snapshot, now)

    def step(self, snapshot: Snapshot, now: float) -> Decision:
        """Applies the policy's decision. A shrinking pool drops the replicas that are still starting first."""
        decision = decide(snapshot, self.state, self.settings, now)
        self.state = decision.state
        more = decision.target - self.target
        if more > 0:
            self.starting += [now] * more
        elif more < 0:
            self.starting = self.starting[: max(0, len(self.starting) + more)]
        self.target = decision.target
        return decision
