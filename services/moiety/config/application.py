"""Settings of the Serve application and of how its deployments scale. Frozen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationInfo, field_validator

from moiety.config.resolve import validated
from moiety.config.services import DETERMINISTIC_HELP, OVERFLOW_HELP, SLICES_HELP, WEIGHTS_HELP, Overflow
from moiety.core.replica import Transport
from moiety.errors import ConfigError

EXPERTS = "experts-"  # name prefix of the expert groups: each holds a share of the experts
HOT = "hot-"  # name prefix of the hot sets: each holds what a placement gives it, in addition to the groups
ROUTER, GATEWAY = "router", "gateway"  # names of the other deployments
GATEWAY_CPUS = 0.5

# what `GroupSettings.with_live` may change
LIVE_SETTINGS = (
    "target_busy",
    "queue_wait_ms",
    "shrink_after_s",
    "shrink_margin",
)


class GroupSettings(BaseModel):
    """How a deployment scales, and the resources and settings of each of its replicas.

    `AppSettings.experts` holds the common settings; `AppSettings.group` returns the settings of one deployment.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_replicas: int = Field(default=1, ge=0, le=1000, description="fewest replicas")
    max_replicas: int = Field(default=4, ge=1, le=1000, description="most replicas")
    num_cpus: float = Field(default=1.0, ge=0, description="Ray CPUs per replica")
    num_gpus: float = Field(default=0.0, ge=0, description="Ray GPUs per replica")
    threads: int = Field(default=1, ge=1, le=1024, description="compute threads per replica")
    weights: Literal["auto", "int8"] = Field(default="auto", description=WEIGHTS_HELP)
    capacity: float | None = Field(
        default=None,
        gt=0,
        description="slow a replica down to this many rows per second, for tests on small machines; default: no limit",
    )
    overflow: Overflow = Field(default="wait", description=OVERFLOW_HELP)
    target_busy: float = Field(default=0.6, gt=0, le=1, description="busy fraction that scaling aims at, 0 to 1")
    queue_wait_ms: float = Field(
        default=50.0, gt=0, description="mean queue wait in milliseconds that forces a step up"
    )
    shrink_after_s: float = Field(default=30.0, ge=0, description="seconds that load must stay low before a step down")
    shrink_margin: float = Field(
        default=0.8,
        gt=0,
        lt=1,
        description="a step down needs a predicted busy fraction below this fraction of target_busy",
    )

    def with_live(self, values: Mapping[str, float]) -> GroupSettings:
        """Returns a copy of these settings with `values` set. Raises ConfigError for a name that is not in LIVE_SETTINGS."""
        for name in values:
            if name not in LIVE_SETTINGS:
                raise ConfigError(f"user_config.{name}", values[name], f"live settings are {', '.join(LIVE_SETTINGS)}")
        return validated(GroupSettings, {**self.model_dump(), **values}) if values else self

    @field_validator("max_replicas")
    @classmethod
    def _at_least_min_replicas(cls, value: int, info: ValidationInfo) -> int:
        if value < (minimum := info.data.get("min_replicas", value)):
            raise ValueError(f"must be at least min_replicas, {minimum}")
        return value


class AppSettings(BaseModel):
    """Arguments of the Serve application. Changing any argument restarts all deployments of the application."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    app: str = Field(
        default="moiety", pattern=r"^[A-Za-z0-9_.-]{1,64}$", description="prefix of this system's registry keys"
    )
    model: str = Field(description="path of the checkpoint folder, the same on every node")
    served_name: str = Field(
        default="", description="model name that clients use; default: the checkpoint folder's name"
    )
    groups: int = Field(default=2, ge=1, le=4096, description="expert groups; at most the model's experts per layer")
    slices: int = Field(default=1, ge=1, le=64, description=f"{SLICES_HELP}; groups must be a multiple of it")
    registry: str = Field(default="redis://127.0.0.1:6379/0", description="redis://… or rediss://…")
    listen_host: str = Field(default="127.0.0.1", description="address to listen on; 0.0.0.0 on a cluster")
    advertise_host: str = Field(
        default="",
        description="address by which others reach a service; default: the node's, or listen_host on loopback",
    )
    grpc_port: int = Field(
        default=50051, ge=0, le=65535, description="port of the gateway, one per node; 0 = a free one"
    )
    dtype: str = Field(default="auto", description="auto (as published), float32, bfloat16 or float16")
    deterministic: bool = Field(default=False, description=DETERMINISTIC_HELP)
    device: str = Field(default="cpu", description="torch device: cpu or cuda")
    router_replicas: int = Field(default=1, ge=1, le=1000, description="number of routers")
    router_cpus: float = Field(default=1.0, ge=0, description="Ray CPUs per router")
    router_gpus: float = Field(default=0.0, ge=0, description="Ray GPUs per router")
    slots: int = Field(default=32, ge=1, le=4096, description="sequences that run at once, per router")
    token_budget: int = Field(default=512, ge=1, le=65536, description="tokens per step, decode and prefill together")
    max_context: int | None = Field(
        default=None, ge=1, description="most tokens per sequence; default: the model's limit"
    )
    kv_memory: ByteSize = Field(
        default=ByteSize(1 << 30), ge=1 << 10, description="bytes of a router for keys, values and states, e.g. 4GiB"
    )
    expert_wait_s: float = Field(
        default=30.0, ge=0, le=3600, description="seconds to wait for a replica that holds an expert, if none does"
    )
    transport: Transport = Field(
        default=Transport.AUTO,
        description="how routers reach experts: auto = shared memory on the same node, else gRPC; grpc, unix or shm",
    )
    prefix_cache: bool = Field(default=True, description="reuse keys and values between prompts with a common prefix")
    speculative_tokens: int = Field(
        default=0,
        ge=0,
        le=64,
        description="tokens drafted from a sequence's own text and verified in one step; 0 = none",
    )
    lanes: int = Field(
        default=0,
        ge=0,
        le=8,
        description="parts of a batch that take turns: one computes while others wait for experts; 0 = chosen by measurement",
    )
    overflow_queue_ms: float = Field(
        default=100.0,
        gt=0,
        le=60_000,
        description="milliseconds of queue wait above which a queue is too long, see `overflow` of `experts`",
    )
    hot_sets: int = Field(
        default=0,
        ge=0,
        le=256,
        description="small deployments that hold only the hottest experts, whichever these are at the time; 0 = none",
    )
    hot_memory: ByteSize = Field(
        default=ByteSize(1 << 30),
        ge=1 << 10,
        description="bytes for the experts of one hot set, e.g. 4GiB; it holds as many as fit",
    )
    rebalance_gain: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="place experts anew if that relieves the slowest replicas by this fraction; "
        "null = 0.1 with hot sets, without them only on `moiety rebalance`",
    )
    rebalance_layers: int = Field(
        default=0,
        ge=0,
        le=1000,
        description="MoE layers placed anew at a time: fewer layers need less spare memory; 0 = all",
    )
    experts: GroupSettings = Field(
        default=GroupSettings(), description="how expert groups scale and what their replicas take"
    )
    overrides: Mapping[str, Mapping[str, Any]] = Field(
        default_factory=dict,
        description="by deployment, what differs from `experts`, e.g. {experts-3: {max_replicas: 8}}; "
        "router and gateway scale by their own load if they are named here",
    )

    @field_validator("overrides")
    @classmethod
    def _valid_overrides(
        cls, value: Mapping[str, Mapping[str, Any]], info: ValidationInfo
    ) -> Mapping[str, Mapping[str, Any]]:
        if isinstance(common := info.data.get("experts"), GroupSettings):
            for deployment, changes in value.items():
                try:
                    validated(GroupSettings, {**common.model_dump(), **changes})
                except ConfigError as error:
                    raise ValueError(f"{deployment}: {error}") from None
                if "overflow" in changes and not deployment.startswith(EXPERTS):
                    raise ValueError(
                        f"{deployment}: overflow is for groups, {EXPERTS}…; a hot set follows the groups of its experts"
                    )
        return value

    def group(self, deployment: str) -> GroupSettings:
        """Returns the settings of `deployment`. Later sources win: `experts`, defaults of its kind, its entry in `overrides`.

        By default a hot set may scale to zero, and the number of routers stays at or above `router_replicas`.
        """
        defaults: dict[str, Any] = {}
        max_replicas = self.experts.max_replicas
        if deployment.startswith(HOT):
            defaults = {"min_replicas": 0}
        elif deployment == ROUTER:
            defaults = {"num_cpus": self.router_cpus, "num_gpus": self.router_gpus}
            defaults["min_replicas"] = self.router_replicas
            defaults["max_replicas"] = max(max_replicas, self.router_replicas)
        elif deployment == GATEWAY:
            defaults = {"min_replicas": 1, "num_cpus": GATEWAY_CPUS, "num_gpus": 0}
        changes = {**defaults, **self.overrides.get(deployment, {})}
        return validated(GroupSettings, {**self.experts.model_dump(), **changes}) if changes else self.experts
