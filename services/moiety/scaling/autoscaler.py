"""The stateful half of autoscaling, in Serve's controller: one thread for each system reads the ledger and decides.

`deploy/autoscaling_hook.py`, which Serve calls, only looks up the target that the thread has published.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from moiety.config.application import GATEWAY, HOT, ROUTER, AppSettings
from moiety.config.options import Scaling
from moiety.config.registry_url import RegistryUrl
from moiety.core.experts import ExpertSet
from moiety.core.supervise import TASKS, supervise, supervise_thread
from moiety.core.system import SystemId
from moiety.errors import ConfigError, MoietyError
from moiety.policy.autoscale import Decision, State, decide
from moiety.registry.interface import Registry
from moiety.scaling.ledger import Ledger, Reading
from moiety.scaling.rebalancer import Rebalancer
from moiety.telemetry.export import configure_metrics
from moiety.telemetry.metrics import Meter
from moiety.telemetry.names import Attribute, MetricName, ResourceAttribute

PERIOD_S = 0.25
HOT_GAIN = 0.1  # gain that justifies a new placement of a system with hot sets, unless rebalance_gain is set
TRUSTED_S = 3.0  # a target older than this is not followed
FORGET_S = 10.0  # Serve asks nine times a second: a deployment it has not asked for this long is gone

_log = logging.getLogger("ray.serve")


@dataclass(slots=True, eq=False)
class Subscription:
    """What Serve asks and what the autoscaler decides for one deployment.

    The threads of Serve and of the autoscaler share it without a lock: they change it by single assignments.
    """

    deployment: str
    settings: Scaling
    held: ExpertSet
    live: Mapping[str, float] = field(default_factory=dict)  # live settings, from user_config
    state: State = field(default_factory=State)
    asked_at: float = 0.0  # time.monotonic() of Serve's last call
    serve_target: int | None = None
    published: tuple[int, float] | None = None  # a target, and time.monotonic() of its decision

    def target(self, serve_target: int, low: int, high: int) -> int:
        """Notes Serve's target and bounds, and returns the target to use. Called by Serve's controller; never waits."""
        now = time.monotonic()
        if (low, high) != (self.settings.min_replicas, self.settings.max_replicas):  # changed in a running application
            self.settings = self.settings.model_copy(update={"min_replicas": low, "max_replicas": high})
        self.serve_target, self.asked_at = serve_target, now
        trusted = self.trusted()
        return serve_target if trusted is None else trusted

    def trusted(self) -> int | None:
        """Returns the last decided target, or None if it is older than TRUSTED_S."""
        published = self.published
        return published[0] if published is not None and time.monotonic() - published[1] < TRUSTED_S else None

    def decide(self, reading: Reading, now: float) -> Decision | None:
        """Decides and publishes the next target; None while Serve's target is unknown. Called by the autoscaler's thread."""
        if self.serve_target is None:
            return None
        # Serve has reached the published target or is about to; Serve's own number is one call old.
        fresh = self.published is not None and now - self.published[1] < TRUSTED_S
        current = self.published[0] if self.published is not None and fresh else self.serve_target
        snapshot = reading.snapshot(self.deployment, current, self.held, spare=self.deployment.startswith(HOT))
        if (live := reading.scaling(self.deployment)) is not None:  # without live replicas, the last values stay
            self.live = live
        try:
            settings = self.settings.with_live(self.live)
        except ConfigError as error:  # a replica checks its live settings, but may run another version
            _log.warning(
                "%s: live scaling settings are ignored, it scales by its arguments: %s", self.deployment, error
            )
            self.live, settings = {}, self.settings
        decision = decide(snapshot, self.state, settings, now)
        self.state, self.published = decision.state, (decision.target, now)
        return decision


class Autoscaler:
    """Decides for all deployments of one system together, every PERIOD_S, in a daemon thread with its own event loop.

    The thread lives until `stop`. If Serve has asked for no target within FORGET_S, the thread reads nothing.
    """

    def __init__(self, settings: AppSettings) -> None:
        self.settings = settings
        self._stopping = False
        self._subscriptions: dict[str, Subscription] = {}
        self._latest: tuple[Reading, float] | None = None  # the last reading of the ledger and its time
        self._thread = supervise_thread("autoscaler", lambda: asyncio.run(self._follow()), restart=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its current round. Returns at once."""
        self._stopping = True

    def add(self, subscription: Subscription) -> None:
        """Adds a deployment to decide for; replaces an earlier one of the same name."""
        self._subscriptions = {**self._subscriptions, subscription.deployment: subscription}

    async def _follow(self) -> None:
        if self._stopping:  # a start that fails is repeated, but not for ever
            return
        # This imports redis-py and OpenTelemetry. In this thread, the import does not block the controller's loop.
        from moiety.registry.connect import connect

        registry = connect(self.settings.registry.get_secret_value(), self.settings.system)
        meter = configure_metrics("moiety-autoscaler", {ResourceAttribute.INSTANCE: self.settings.app})
        meter.observe(MetricName.TASK_FAILURES, TASKS.total_failures)
        try:
            ledger, rebalancer = Ledger(registry), self._rebalancer(registry)
            scaling = supervise("autoscaling", lambda: self._decide_all(registry, ledger, meter))
            await asyncio.wait([scaling, supervise("rebalancing", lambda: self._rebalance(rebalancer))])
        finally:
            await registry.close()
            meter.shutdown()

    async def _decide_all(self, registry: Registry, ledger: Ledger, meter: Meter) -> None:
        """Decides for all deployments every PERIOD_S, until `stop`."""
        while not self._stopping:
            began = time.monotonic()
            if active := [one for one in self._subscriptions.values() if began - one.asked_at < FORGET_S]:
                for subscription in active:
                    attributes = {Attribute.DEPLOYMENT: subscription.deployment}
                    meter.observe(MetricName.TARGET, subscription.trusted, attributes)
                reading = await ledger.read()
                self._latest = reading, began
                await _decide(active, reading, registry)
            await asyncio.sleep(max(0.0, began + PERIOD_S - time.monotonic()))

    async def _rebalance(self, rebalancer: Rebalancer) -> None:
        """Shows each reading to the rebalancer, until `stop`. A task of its own: planning a placement delays no decision."""
        seen: tuple[Reading, float] | None = None
        while not self._stopping:
            if (latest := self._latest) is not None and latest is not seen:
                seen = latest
                reading, now = latest
                await rebalancer.follow(reading, self._default(), now)
            await asyncio.sleep(PERIOD_S)

    def _rebalancer(self, registry: Registry) -> Rebalancer:
        gain = self.settings.rebalance_gain or (HOT_GAIN if self.settings.hot_sets else None)
        return Rebalancer(registry, gain, int(self.settings.hot_memory), self.settings.rebalance_layers)

    def _default(self) -> Mapping[str, ExpertSet] | None:
        """Returns the experts of each deployment by default, or None until all groups and hot sets are subscribed."""
        held = {name: one.held for name, one in self._subscriptions.items() if name not in (ROUTER, GATEWAY)}
        return held if len(held) == self.settings.groups + self.settings.hot_sets else None


async def _decide(active: Sequence[Subscription], reading: Reading, registry: Registry) -> None:
    now = time.monotonic()
    for subscription in active:
        decision = subscription.decide(reading, now)
        if decision is not None and decision.changes:
            _log.info("%s: %s", decision.deployment, decision.reason)
            await _record(registry, decision)


async def _record(registry: Registry, decision: Decision) -> None:
    entry = {
        "time": time.time(),
        "deployment": decision.deployment,
        "from": decision.current,
        "to": decision.target,
        "reason": decision.reason,
        "inputs": dict(decision.inputs),
    }
    try:
        await registry.record_decision(entry)
    except MoietyError as error:
        _log.warning("%s: the decision applies, but could not be recorded: %s", decision.deployment, error)


# Serve creates one policy object per deployment, and these share nothing but the process. Hence the global.
_lock = threading.Lock()
_autoscalers: dict[tuple[RegistryUrl, SystemId], Autoscaler] = {}


def subscribe(deployment: str, settings: AppSettings, held: str) -> Subscription:
    """Adds `deployment` to its system's autoscaler and returns its subscription; starts the autoscaler if none runs.

    An autoscaler has one set of settings. A system that was deployed again with others gets a new one.
    """
    subscription = Subscription(
        deployment, settings.scaling(deployment), ExpertSet.parse(held), asked_at=time.monotonic()
    )
    with _lock:
        key = (settings.registry, settings.system)
        autoscaler = _autoscalers.get(key)
        if autoscaler is None or not autoscaler.alive or autoscaler.settings != settings:
            if autoscaler is not None:
                autoscaler.stop()
            autoscaler = _autoscalers[key] = Autoscaler(settings)
            autoscaler.add(subscription)
            autoscaler.start()
        else:
            autoscaler.add(subscription)
    return subscription
