"""Frozen settings, one model per service: the only reader of the environment and of YAML files.

Precedence, resolved once in `resolve`: flag > MOIETY_* environment variable > YAML file > default.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from moiety.core import ExpertSet, Transport
from moiety.errors import ConfigError

ENV_PREFIX = "MOIETY_"
EXPERTS = "experts-"  # deployments of this name, the groups, hold a share of the experts each
HOT = "hot-"  # and those of this name what a placement gives them, beside the groups
ROUTER, GATEWAY = "router", "gateway"  # the other deployments
GATEWAY_CPUS = 0.5
LIVE = ("target_busy", "queue_wait_ms", "shrink_after_s", "shrink_margin")  # of GroupSettings, see `GroupSettings.live`
DTYPES = ("auto", "float32", "bfloat16", "float16")
WEIGHTS_HELP = "how experts are held: auto = as published, int8 = quantised when they are loaded, half of bfloat16"
DETERMINISTIC_HELP = "bits that depend on the request alone: not on its batch, on lanes, replicas or retries"
SLICES_HELP = "parts that every expert is cut into, each held by a group of its own; for experts too large for a device"
OVERFLOW_HELP = (
    "rows whose expert has too long a queue everywhere: wait, which is exact, or go to the next-best expert of theirs"
)
Overflow = Literal["wait", "backup"]
Settings = TypeVar("Settings", bound=BaseModel)


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


def resolve(kind: type[Settings], flags: Mapping[str, Any], yaml_path: str | None = None) -> Settings:
    """Settings of `kind` from flags (None = not given), MOIETY_* variables and a YAML file, in that order."""
    values: dict[str, Any] = {}
    if yaml_path is not None:
        values.update(_read_yaml(yaml_path))
    for name in kind.model_fields:
        if (text := os.environ.get(ENV_PREFIX + name.upper())) is not None:
            values[name] = text
    values.update({name: value for name, value in flags.items() if value is not None})
    return validated(kind, values)


def cache_dir() -> Path | None:
    """Where derived files may be kept between runs: $MOIETY_CACHE or ~/.cache/moiety; None where there is no home."""
    if text := os.environ.get(ENV_PREFIX + "CACHE"):
        return Path(text)
    try:
        return Path.home() / ".cache" / "moiety"
    except RuntimeError:
        return None


def validated(kind: type[Settings], values: Mapping[str, Any]) -> Settings:
    """`kind(**values)`, with the first problem told as a ConfigError."""
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        value = None if first["type"] == "missing" else first["input"]  # else it is everything that was given
        raise ConfigError(".".join(map(str, first["loc"])), value, first["msg"].removeprefix("Value error, ")) from None


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError("config file", path, f"cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError("config file", path, "must hold a mapping of settings")
    return data
