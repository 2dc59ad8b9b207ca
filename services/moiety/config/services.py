"""Settings of one service: an expert replica, a router or a gateway. Frozen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationInfo, field_validator

from moiety.core.experts import ExpertSet
from moiety.core.replica import Transport

DTYPES = ("auto", "float32", "bfloat16", "float16")
WEIGHTS_HELP = (
    "format of expert weights in memory: auto = as published, int8 = quantised while loading, half the size of bfloat16"
)
DETERMINISTIC_HELP = (
    "make every output depend, bit by bit, on its request alone: not on batch, lanes, replicas or retries"
)
SLICES_HELP = (
    "parts that every expert is cut into, each held by a group of its own, for experts too large for a device; "
    "1 = whole experts"
)
OVERFLOW_HELP = (
    "what rows do while all queues for their expert are too long: wait, which is exact, or backup = go to their "
    "next-best expert"
)

Overflow = Literal["wait", "backup"]


class ServiceSettings(BaseModel):
    """The settings of every service: which model, which registry, where to listen."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(description="path of the checkpoint folder")
    served_name: str = Field(
        default="", description="model name that clients use; default: the checkpoint folder's name"
    )
    app: str = Field(
        default="moiety", pattern=r"^[A-Za-z0-9_.-]{1,64}$", description="prefix of this system's registry keys"
    )
    registry: str = Field(
        default="redis://127.0.0.1:6379/0", description="redis://…, rediss://…, unix:///… or file:///…"
    )
    listen_host: str = Field(default="127.0.0.1", description="address to listen on; 0.0.0.0 = every interface")
    advertise_host: str = Field(
        default="", description="address by which others reach this service; default: listen_host"
    )
    port: int = Field(default=0, ge=0, le=65535, description="gRPC port; 0 = a free one")
    threads: int = Field(default=1, ge=1, le=1024, description="compute threads")
    dtype: str = Field(default="auto", description="auto (as published), float32, bfloat16 or float16")
    device: str = Field(default="cpu", description="torch device: cpu or cuda")
    drain_s: float = Field(
        default=8.0, ge=0, le=600, description="seconds that work in flight gets to finish on shutdown"
    )

    @field_validator("dtype")
    @classmethod
    def _known_dtype(cls, value: str) -> str:
        if value not in DTYPES:
            raise ValueError(f"must be one of {', '.join(DTYPES)}")
        return value

    @property
    def name(self) -> str:
        return self.served_name or Path(self.model).name

    @property
    def advertised(self) -> str:
        return self.advertise_host or self.listen_host


class ExpertSettings(ServiceSettings):
    """Settings of one replica of an expert group or hot set."""

    slices: int = Field(default=1, ge=1, le=64, description=SLICES_HELP)
    deployment: str = Field(default="experts-0", description="name of the expert group, or hot set, it belongs to")
    held: str = Field(
        description="experts to hold until a placement says otherwise, e.g. 0-31:0-7 = experts 0 to 7 of layers 0 to 31"
    )
    weights: Literal["auto", "int8"] = Field(default="auto", description=WEIGHTS_HELP)
    deterministic: bool = Field(default=False, description=DETERMINISTIC_HELP)
    queue_calls: int = Field(default=256, ge=1, le=65536, description="calls that may wait for the device")
    capacity: float | None = Field(
        default=None,
        gt=0,
        description="slow the experts down to this many rows per second, for tests on small machines; default: no limit",
    )

    @field_validator("held")
    @classmethod
    def _readable(cls, value: str) -> str:
        return str(ExpertSet.parse(value))


class RouterSettings(ServiceSettings):
    """Settings of one router."""

    deployment: str = Field(default="router", description="name of the deployment it belongs to")
    threads: int = Field(default=0, ge=0, le=1024, description="most compute threads; 0 = every core it may use")
    slices: int = Field(default=1, ge=1, le=64, description=SLICES_HELP)
    deterministic: bool = Field(default=False, description=DETERMINISTIC_HELP)
    slots: int = Field(default=32, ge=1, le=4096, description="sequences that run at once")
    max_context: int | None = Field(
        default=None, ge=1, description="most tokens per sequence; default: the model's limit"
    )
    token_budget: int = Field(default=512, ge=1, le=65536, description="tokens per step, decode and prefill together")
    kv_memory: ByteSize = Field(
        default=ByteSize(1 << 30), ge=1 << 10, description="bytes for keys, values and states, e.g. 4GiB"
    )
    block_tokens: int = Field(default=16, ge=1, le=1024, description="tokens per block of the KV cache")
    prefix_cache: bool = Field(default=True, description="reuse keys and values between prompts with a common prefix")
    speculative_tokens: int = Field(
        default=0,
        ge=0,
        le=64,
        description="tokens drafted from a sequence's own text and verified in one step; 0 = none",
    )
    queue_limit: int = Field(
        default=256, ge=1, le=1_000_000, description="requests that may wait for a slot before RESOURCE_EXHAUSTED"
    )
    expert_wait_s: float = Field(
        default=30.0, ge=0, le=3600, description="seconds to wait for a replica that holds an expert, if none does"
    )
    hedge_after_s: float = Field(default=0.02, gt=0, le=60, description="least seconds before a call is sent again")
    retry_budget: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="most hedges (slow calls sent to other replicas too), as a fraction of calls",
    )
    overflow: Overflow = Field(default="wait", description=OVERFLOW_HELP)
    overflow_groups: Mapping[str, Overflow] = Field(
        default_factory=dict, description="by expert group, what differs from `overflow`, e.g. {experts-3: backup}"
    )
    overflow_queue_ms: float = Field(
        default=100.0, gt=0, le=60_000, description="milliseconds of queue wait above which a queue is too long"
    )
    lanes: int = Field(
        default=0,
        ge=0,
        le=8,
        description="parts of a batch that take turns: one computes while others wait for experts; 0 = chosen by measurement",
    )
    transport: Transport = Field(
        default=Transport.AUTO,
        description="how calls reach experts: auto = shared memory on the same node, else gRPC; grpc, unix or shm. "
        "Replicas that it cannot reach are left out",
    )

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

    @field_validator("token_budget")
    @classmethod
    def _at_least_slots(cls, value: int, info: ValidationInfo) -> int:
        if value < (slots := info.data.get("slots", value)):
            raise ValueError(f"must be at least slots, {slots}, or prompts would starve")
        return value


class GatewaySettings(ServiceSettings):
    """Settings of one gateway."""

    deployment: str = Field(default="gateway", description="name of the deployment it belongs to")
    max_concurrent: int = Field(
        default=1024, ge=1, description="requests in flight, at most, before RESOURCE_EXHAUSTED"
    )
    router_wait_s: float = Field(default=30.0, ge=0, le=3600, description="seconds to wait for a ready router")
