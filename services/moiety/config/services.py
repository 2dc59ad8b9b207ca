"""Settings of one service's process: an expert replica, a router or a gateway. Frozen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationInfo, field_validator

from moiety.config.options import ExpertOptions, GatewayOptions, Overflow, RouterOptions, SystemOptions
from moiety.core.experts import ExpertSet

Deployment = Annotated[str, Field(description="Name of the deployment that the service belongs to.")]


class ServiceSettings(SystemOptions):
    """The settings of every service."""

    deployment: Deployment

    @property
    def name(self) -> str:
        return self.served_name or Path(self.model).name

    @property
    def advertised(self) -> str:
        return self.advertise_host or self.listen_host


class ExpertSettings(ServiceSettings, ExpertOptions):
    """Settings of one replica of an expert group or hot set."""

    deployment: Deployment = "experts-0"
    held: str
    """Experts to hold until a placement says otherwise, e.g. 0-31:0-7 = experts 0 to 7 of layers 0 to 31."""

    @field_validator("held")
    @classmethod
    def _readable(cls, value: str) -> str:
        return str(ExpertSet.parse(value))


class RouterSettings(ServiceSettings, RouterOptions):
    """Settings of one router."""

    deployment: Deployment = "router"
    overflow: Overflow = "wait"
    """As `overflow` of the expert groups in `AppSettings`, for those that `overflow_groups` does not name."""
    overflow_groups: Mapping[str, Overflow] = Field(default_factory=dict)
    """By expert group, what differs from `overflow`, e.g. {experts-3: backup}."""

    def allows_backup(self, group: str) -> bool:
        """Whether rows for experts of `group` may go to their next-best expert while the queues of `group` are too long."""
        return self.overflow_groups.get(group, self.overflow) == "backup"

    @property
    def may_overflow(self) -> bool:
        """Whether rows for at least one expert group may go to their next-best expert."""
        return "backup" in (self.overflow, *self.overflow_groups.values())

    @field_validator("overflow", "overflow_groups")
    @classmethod
    def _backup_is_not_deterministic(cls, value: Any, info: ValidationInfo) -> Any:
        chosen = value.values() if isinstance(value, Mapping) else (value,)
        if "backup" in chosen and info.data.get("deterministic"):
            raise ValueError("backup makes tokens depend on the load: not possible with deterministic")
        return value


class GatewaySettings(ServiceSettings, GatewayOptions):
    """Settings of one gateway."""

    deployment: Deployment = "gateway"
