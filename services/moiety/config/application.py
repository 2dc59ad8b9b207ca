"""Settings of the Serve application, and of how its deployments scale. Frozen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationInfo, field_validator

from moiety.config.resolve import validated
from moiety.config.services import DETERMINISTIC_HELP, OVERFLOW_HELP, SLICES_HELP, WEIGHTS_HELP, Overflow
from moiety.core.replica import Transport
from moiety.errors import ConfigError

EXPERTS = "experts-"  # deployments of this name, the groups, hold a share of the experts each


HOT = "hot-"  # and those of this name what a placement gives them, beside the groups


ROUTER, GATEWAY = "router", "gateway"  # the other deployments


GATEWAY_CPUS = 0.5


LIVE = ("target_busy", "queue_wait_ms", "shrink_after_s", "shrink_margin")  # of GroupSettings, see `GroupSettings.live`


class GroupSettings(BaseModel):
    """How one expert group is scaled and what a replica of it takes; the same for every group of an app."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_replicas: int = Field(default=1, ge=0, le=1000)
    max_replicas: int = Field(default=4, ge=1, le=1000)
    num_cpus: float = Field(default=1.0, ge=0, description="Ray CPUs per replica")
    num_gpus: float = Field(default=0.0, ge=0, description="Ray GPUs per replica")
    threads: int = Field(default=1, ge=1, le=1024)
    weights: Literal["auto", "int8"] = Field(default="auto", description=WEIGHTS_HELP)
    capacity: float | None = Field(default=None, gt=0, description="pace a replica to this many rows per second")
    overflow: Overflow = Field(default="wait", description=OVERFLOW_HELP)
    target_busy: float = Field(default=0.6, gt=0, le=1, description="busy fraction that scaling aims at")
    queue_wait_ms: float = Field(default=50.0, gt=0, description="mean wait that forces a step up")
    shrink_after_s: float = Field(default=30.0, ge=0, description="how long load must stay low before a step down")
    shrink_margin: float = Field(
        default=0.8, gt=0, lt=1, description="predicted busy after a step down stays below this fraction of the target"
    )

    def live(self, values: Mapping[str, float]) -> GroupSettings:
        """These settings with those of `values` that may change while replicas run. Raises ConfigError for another one."""
        for name in values:
            if name not in LIVE:
                raise ConfigError(f"user_config.{name}", values[name], f"live settings are {', '.join(LIVE)}")
        return validated(GroupSettings, {**self.model_dump(), **values}) if values else self

    @field_validator("max_replicas")
    @classmethod
    def _not_below_the_least(cls, value: int, info: ValidationInfo) -> int:
        if value < (least := info.data.get("min_replicas", value)):
            raise ValueError(f"must be at least min_replicas, {least}")
        return value


class AppSettings(BaseModel):
    """Arguments of the Serve application; changing one restarts every deployment of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    app: str = Field(default="moiety", pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    model: str = Field(description="path of the checkpoint folder, the same on every node")
    served_name: str = ""
    groups: int = Field(default=2, ge=1, le=4096, description="expert groups; at most the model's experts per layer")
    slices: int = Field(default=1, ge=1, le=64, description=f"{SLICES_HELP}; groups must be a multiple of it")
    registry: str = "redis://127.0.0.1:6379/0"
    listen_host: str = Field(default="127.0.0.1", description="0.0.0.0 on a cluster")
    advertise_host: str = Field(default="", description="default: the node's address, or listen_host on loopback")
    grpc_port: int = Field(default=50051, ge=0, le=65535, description="the gateway's, one per node")
    dtype: str = "auto"
    deterministic: bool = Field(default=False, description=DETERMINISTIC_HELP)
    device: str = "cpu"
    router_replicas: int = Field(default=1, ge=1, le=1000)
    router_cpus: float = Field(default=1.0, ge=0)
    router_gpus: float = Field(default=0.0, ge=0)
    slots: int = Field(default=32, ge=1, le=4096)
    token_budget: int = Field(default=512, ge=1, le=65536)
    max_context: int | None = Field(default=None, ge=1)
    kv_memory: ByteSize = Field(default=ByteSize(1 << 30), ge=1 << 10)
    expert_wait_s: float = Field(default=30.0, ge=0, le=3600)
    transport: Transport = Transport.AUTO
    prefix_cache: bool = True
    speculative_tokens: int = Field(default=0, ge=0, le=64)
    lanes: int = Field(default=0, ge=0, le=8)
    overflow_queue_ms: float = Field(
        default=100.0, gt=0, le=60_000, description="a longer queue than that is too long, see `overflow` of `experts`"
    )
    hot_sets: int = Field(
        default=0,
        ge=0,
        le=256,
        description="small deployments that hold nothing but the hottest experts, as these change",
    )
    hot_memory: ByteSize = Field(
        default=ByteSize(1 << 30), ge=1 << 10, description="for the experts of one hot set: it holds as many as fit"
    )
    rebalance_gain: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="place experts anew where that relieves the slowest replicas by this fraction; "
        "null = 0.1 where there are hot sets, else only when `moiety rebalance` says so",
    )
    rebalance_layers: int = Field(
        default=0,
        ge=0,
        le=1000,
        description="MoE layers placed anew at a time: fewer need less memory to spare; 0 = all",
    )
    experts: GroupSettings = GroupSettings()
    overrides: Mapping[str, Mapping[str, Any]] = Field(
        default_factory=dict,
        description="by deployment, what differs from `experts`: {experts-3: {max_replicas: 8}}; "
        "router and gateway scale by their own load where they are named here",
    )

    @field_validator("overrides")
    @classmethod
    def _possible(cls, value: Mapping[str, Mapping[str, Any]], info: ValidationInfo) -> Mapping[str, Mapping[str, Any]]:
        if isinstance(common := info.data.get("experts"), GroupSettings):
            for deployment, differing in value.items():
                try:
                    validated(GroupSettings, {**common.model_dump(), **differing})
                except ConfigError as error:
                    raise ValueError(f"{deployment}: {error}") from None
                if "overflow" in differing and not deployment.startswith(EXPERTS):
                    raise ValueError(f"{deployment}: overflow is for groups, {EXPERTS}…: hot sets do as theirs do")
        return value

    def group(self, deployment: str) -> GroupSettings:
        """How `deployment` is scaled and what a replica of it takes. Hot sets may always go to zero, routers never."""
        own: dict[str, Any] = {}
        most = self.experts.max_replicas
        if deployment.startswith(HOT):
            own = {"min_replicas": 0}
        elif deployment == ROUTER:
            own = {"num_cpus": self.router_cpus, "num_gpus": self.router_gpus}
            own["min_replicas"], own["max_replicas"] = self.router_replicas, max(most, self.router_replicas)
        elif deployment == GATEWAY:
            own = {"min_replicas": 1, "num_cpus": GATEWAY_CPUS, "num_gpus": 0}
        differing = {**own, **self.overrides.get(deployment, {})}
        return validated(GroupSettings, {**self.experts.model_dump(), **differing}) if differing else self.experts
