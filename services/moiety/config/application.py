"""Settings of the whole application: of the system, and of each of its deployments. Frozen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import ByteSize, Field, ValidationInfo, field_validator

from moiety.config.options import (
    Cpus,
    ExpertOptions,
    GatewayOptions,
    Host,
    MaxReplicas,
    MinReplicas,
    Overflow,
    RouterOptions,
    Scaling,
    Size,
    SystemOptions,
)
from moiety.config.validate import validated
from moiety.errors import NOT_SHOWN, ConfigError

EXPERTS = "experts-"  # name prefix of the expert groups: each holds a share of the experts
HOT = "hot-"  # name prefix of the hot sets: each holds what a placement gives it, in addition to the groups
ROUTER, GATEWAY = "router", "gateway"  # names of the other deployments


class StandingScaling(Scaling):
    """Scaling of routers and gateways: always at least one replica, and by default a fixed number."""

    min_replicas: Annotated[MinReplicas, Field(ge=1)] = 1
    max_replicas: MaxReplicas = 1


class RouterDeployment(RouterOptions, StandingScaling):
    """The routers: how many there are, and what each can be set to."""


class GatewayDeployment(GatewayOptions, StandingScaling):
    """The gateways: how many there are, and what each can be set to."""

    num_cpus: Cpus = 0.5
    listen_host: Host | None = None
    """Address on which the gateway listens for clients; default: listen_host of the system."""


class ExpertDeployment(ExpertOptions, Scaling):
    """An expert group or hot set: how it scales, and what its replicas and their callers can be set to."""

    overflow: Overflow = "wait"
    """What rows do while all queues for their expert are too long: wait, which is exact, or backup = the next-best expert."""


class AppSettings(SystemOptions):
    """Arguments of the Serve application. Changing any argument restarts all deployments of the application."""

    hot_sets: int = Field(default=0, ge=0, le=256)
    """Small deployments that hold only the hottest experts, whichever these are at the time; 0 = none."""
    hot_memory: Size = ByteSize(1 << 30)
    """Bytes for the experts of one hot set, e.g. 4GiB; it holds as many as fit."""
    rebalance_gain: float | None = Field(default=None, gt=0, lt=1)
    """Place experts anew if that relieves the slowest replicas by this fraction.

    null = 0.1 with hot sets, without them only on `moiety rebalance`.
    """
    rebalance_layers: int = Field(default=0, ge=0, le=1000)
    """MoE layers placed anew at a time: fewer layers need less spare memory; 0 = all."""
    router: RouterDeployment = RouterDeployment()
    """Routers."""
    gateway: GatewayDeployment = GatewayDeployment()
    """Gateways, the door for clients."""
    experts: ExpertDeployment = ExpertDeployment()
    """Expert groups; hot sets too, which may also scale to zero."""
    overrides: Mapping[str, Mapping[str, Any]] = Field(default_factory=dict)
    """By expert group or hot set, what differs from `experts`, e.g. {experts-3: {max_replicas: 8}}."""

    @field_validator("overrides")
    @classmethod
    def _valid_overrides(
        cls, value: Mapping[str, Mapping[str, Any]], info: ValidationInfo
    ) -> Mapping[str, Mapping[str, Any]]:
        """Raises ConfigError, which pydantic passes on: it names an entry to the leaf, which a ValueError here could not."""
        common, *counts = (info.data.get(name) for name in ("experts", "groups", "hot_sets"))
        if common is None or None in counts:
            return value  # one of these is refused itself
        known = {kind: count for kind, count in zip((EXPERTS, HOT), counts, strict=True) if count}
        names = {f"{kind}{number}" for kind, count in known.items() for number in range(count)}
        for name, changes in value.items():
            if name not in names:
                there = ", ".join(f"{kind}0 to {kind}{count - 1}" for kind, count in known.items())
                raise ConfigError(f"overrides.{name}", NOT_SHOWN, f"no such expert group or hot set; there are {there}")
            if "overflow" in changes and not name.startswith(EXPERTS):
                bound = f"is for groups, {EXPERTS}…; a hot set follows the groups of its experts"
                raise ConfigError(f"overrides.{name}.overflow", changes["overflow"], bound)
            try:
                _changed(common, name, changes)
            except ConfigError as error:
                raise ConfigError(f"overrides.{name}.{error.field}", error.value, error.bound) from None
        return value

    def group(self, name: str) -> ExpertDeployment:
        """Returns the settings of an expert group or hot set: those of `experts`, changed by its entry in `overrides`.

        A hot set may scale to zero unless its entry says otherwise.
        """
        return _changed(self.experts, name, self.overrides.get(name, {}))

    def scaling(self, deployment: str) -> Scaling:
        """Returns how `deployment` scales: the routers, the gateways, an expert group or a hot set."""
        standing: Mapping[str, Scaling] = {ROUTER: self.router, GATEWAY: self.gateway}
        return standing.get(deployment) or self.group(deployment)


def _changed(common: ExpertDeployment, name: str, changes: Mapping[str, Any]) -> ExpertDeployment:
    """Returns the settings of an expert group or hot set from those `common` to all, and `changes` for this one."""
    if name.startswith(HOT):
        changes = {"min_replicas": 0, **changes}
    return validated(ExpertDeployment, {**common.model_dump(), **changes}) if changes else common
