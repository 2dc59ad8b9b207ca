"""Settings of one service: an expert replica, a router or a gateway. Frozen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationInfo, field_validator

from moiety.core.experts import ExpertSet
from moiety.core.replica import Transport

DTYPES = ("auto", "float32", "bfloat16", "float16")


WEIGHTS_HELP = "how experts are held: auto = as published, int8 = quantised when they are loaded, half of bfloat16"


DETERMINISTIC_HELP = "bits that depend on the request alone: not on its batch, on lanes, replicas or retries"


SLICES_HELP = "parts that every expert is cut into, each held by a group of its own; for experts too large for a device"


OVERFLOW_HELP = (
    "rows whose expert has too long a queue everywhere: wait, which is exact, or go to the next-best expert of theirs"
)


Overflow = Literal["wait", "backup"]


class ServiceSettings(BaseModel):
    """What every service needs: which model, which registry, where to listen."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(description="path of the checkpoint folder")
    served_name: str = Field(default="", description="name clients ask for; default: the folder's name")
    app: str = Field(
        default="moiety", pattern=r"^[A-Za-z0-9_.-]{1,64}$", description="prefix of this system's registry keys"
    )
    registry: str = Field(default="redis://127.0.0.1:6379/0", description="redis://…, rediss://… or file:///…")
    listen_host: str = "127.0.0.1"
    advertise_host: str = Field(default="", description="address others reach this host by; default: listen_host")
    port: int = Field(default=0, ge=0, le=65535, description="0 = a free one")
    threads: int = Field(default=1, ge=1, le=1024, description="compute threads")
    dtype: str = Field(default="auto", description="auto = as published")
    device: str = "cpu"
    drain_s: float = Field(default=8.0, ge=0, le=600, description="time for work in flight on shutdown")

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
    """One replica of an expert group."""

    slices: int = Field(default=1, ge=1, le=64, description=SLICES_HELP)

    deployment: str = "experts-0"
    held: str = Field(description="experts to hold until a placement says otherwise, e.g. 0-31:0-7")
    weights: Literal["auto", "int8"] = Field(default="auto", description=WEIGHTS_HELP)
    deterministic: bool = Field(default=False, description=DETERMINISTIC_HELP)
    queue_calls: int = Field(default=256, ge=1, le=65536, description="calls that may wait for the device")
    capacity: float | None = Field(
        default=None,
        gt=0,
        description="pace the experts to at most this many rows per second (for tests on small machines)",
    )

    @field_validator("held")
    @classmethod
    def _readable(cls, value: str) -> str:
        return str(ExpertSet.parse(value))


class RouterSettings(ServiceSettings):
    """A router."""

    deployment: str = "router"
    threads: int = Field(default=0, ge=0, le=1024, description="compute threads, at most; 0: every core it may use")
    slices: int = Field(default=1, ge=1, le=64, description=SLICES_HELP)
    deterministic: bool = Field(default=False, description=DETERMINISTIC_HELP)
    slots: int = Field(default=32, ge=1, le=4096, description="sequences that run at once")
    max_context: int | None = Field(default=None, ge=1, description="tokens per sequence; default: the model's")
    token_budget: int = Field(default=512, ge=1, le=65536, description="tokens per step, decode and prefill together")
    kv_memory: ByteSize = Field(
        default=ByteSize(1 << 30), ge=1 << 10, description="memory for keys, values and states, e.g. 4GiB"
    )
    block_tokens: int = Field(default=16, ge=1, le=1024, description="tokens of one block of keys and values")
    prefix_cache: bool = Field(default=True, description="reuse the keys and values of prompts that begin alike")
    speculative_tokens: int = Field(
        default=0, ge=0, le=64, description="tokens guessed ahead from a sequence's own text and computed in one step"
    )
    queue_limit: int = Field(default=256, ge=1, le=1_000_000, description="requests that may wait for a slot")
    expert_wait_s: float = Field(default=30.0, ge=0, le=3600, description="wait for a holder of an expert none holds")
    hedge_after_s: float = Field(default=0.02, gt=0, le=60, description="least wait before a call is sent again")
    retry_budget: float = Field(
        default=0.1, ge=0, le=1, description="hedges and timeout retries, as a fraction of calls"
    )
    overflow: Overflow = Field(default="wait", description=OVERFLOW_HELP)
    overflow_groups: Mapping[str, Overflow] = Field(
        default_factory=dict, description="by expert group, where it differs from `overflow`: {experts-3: backup}"
    )
    overflow_queue_ms: float = Field(default=100.0, gt=0, le=60_000, description="a longer queue than that is too long")
    lanes: int = Field(
        default=0,
        ge=0,
        le=8,
        description="parts of a batch that take turns, one computing while others wait for experts; 0 = measure what pays",
    )
    transport: Transport = Field(
        default=Transport.AUTO,
        description="how calls reach experts: auto = shared memory on the same node, else gRPC; grpc; unix; shm. "
        "Replicas that cannot be reached as told are left out",
    )

    def spares(self, group: str) -> bool:
        """Whether rows of this expert group's experts may go to others while its queues are too long."""
        return self.overflow_groups.get(group, self.overflow) == "backup"

    @property
    def may_overflow(self) -> bool:
        """Whether some group's rows may."""
        return "backup" in (self.overflow, *self.overflow_groups.values())

    @field_validator("overflow", "overflow_groups")
    @classmethod
    def _one_or_the_other(cls, value: Any, info: ValidationInfo) -> Any:
        chosen = value.values() if isinstance(value, Mapping) else (value,)
        if "backup" in chosen and info.data.get("deterministic"):
            raise ValueError("backup changes tokens with the load of the moment: not with deterministic")
        return value

    @field_validator("token_budget")
    @classmethod
    def _room_for_prompts(cls, value: int, info: ValidationInfo) -> int:
        if value < (slots := info.data.get("slots", value)):
            raise ValueError(f"must be at least slots, {slots}: prompts would starve")
        return value


class GatewaySettings(ServiceSettings):
    """A gateway."""

    deployment: str = "gateway"
    max_concurrent: int = Field(default=1024, ge=1, description="requests in flight before RESOURCE_EXHAUSTED")
    router_wait_s: float = Field(default=30.0, ge=0, le=3600, description="wait for a ready router")
