"""What can be set, each setting declared once: for the system, for one kind of service, and for how a deployment scales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)
from pydantic_core import PydanticCustomError

from moiety.config.bounds import Words
from moiety.config.registry_url import RegistryUrl
from moiety.config.validate import validated
from moiety.core import address
from moiety.core.replica import Transport
from moiety.core.system import SystemId
from moiety.errors import ConfigError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Verify = Literal["sampled", "full"]
DTYPES: tuple[str, ...] = get_args(Dtype)
Overflow = Literal["wait", "backup"]
_SIZE = {"type": ["integer", "string"], "minimum": 1 << 10, "pattern": r"^[0-9]+(\.[0-9]+)?\s*([KMGT]i?B)?$"}
Size = Annotated[ByteSize, Field(ge=1 << 10), WithJsonSchema(_SIZE)]  # bytes, with or without a unit
DEFAULT_HTTP_PORT = 50080  # of the gateway's OpenAI API, beside gRPC's 50051
# What `Scaling.with_live` may change.
LIVE_SETTINGS = ("target_busy", "queue_wait_ms", "shrink_after_s", "shrink_margin")


def _no_flag(value: Any) -> Any:
    """Refuses true and false, which pydantic takes for 1 and 0, where a number is wanted."""
    if isinstance(value, bool):
        raise PydanticCustomError("flag", "a flag is no number")
    return value


def _host(text: str) -> str:
    """Returns a host without the brackets of IPv6."""
    try:
        return address.host(text) if text else text
    except ValueError:
        raise ValueError("must be a name or an address without a port, such as 0.0.0.0 or ::1") from None


# IPv6 without brackets; core/address.py adds them beside a port. The pattern: brackets, no colon, or several.
_HOST = {"type": "string", "pattern": r"^(\[[^\]]+\]|[^:/\s]*|[^/\s]*:[^/\s]*:[^/\s]*)$"}
Host = Annotated[str, AfterValidator(_host), WithJsonSchema(_HOST)]

# Settings whose default depends on the kind of service.
MinReplicas = Annotated[int, Field(ge=0, le=1000, description="Fewest replicas.")]
MaxReplicas = Annotated[int, Field(ge=1, le=1000, description="Most replicas; above min_replicas, the load decides.")]
Cpus = Annotated[float, Field(ge=0, description="Ray CPUs per replica.")]
# Resources that `Scaling.resources` may not name, because Ray takes them elsewhere, and what to set instead.
RESERVED = {"cpu": "set num_cpus", "gpu": "set num_gpus", "memory": "not offered"}


class Options(BaseModel):
    """Base of all settings: frozen, and closed to unknown names. The text below a setting is its description."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True, use_attribute_docstrings=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_flag_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[str(info.field_name)].annotation
        return value if kind is bool else _no_flag(value)


class SystemOptions(Options):
    """What concerns every service of a system."""

    app: Annotated[str, Words("1 to 64 of the characters A-Z, a-z, 0-9, _, . and -")] = Field(
        default="moiety", pattern=r"^[A-Za-z0-9_.-]{1,64}$"
    )
    """Name of the application, the first part of the system's identity and of its registry keys."""
    cluster: Annotated[str, Words("at most 128 of the characters A-Z, a-z, 0-9, _, . and -")] = Field(
        default="", pattern=r"^[A-Za-z0-9_.-]{0,128}$"
    )
    """Name of the cluster that runs the system; default: Ray's session. Systems of different clusters share nothing."""
    model: str
    """Path of the checkpoint folder, the same on every node."""
    revision: Annotated[str, Words("32 hexadecimal digits, as `moiety inspect` prints them, or empty")] = Field(
        default="", pattern=r"^([0-9a-f]{32})?$"
    )
    """Revision that the checkpoint must have on every node; default: that of the folder where the system is deployed."""
    verify: Verify = "sampled"
    """What a revision covers: sampled = parts of every tensor, full = every byte, which reads the whole checkpoint once."""
    served_name: str = ""
    """Model name that clients use; default: the checkpoint folder's name."""
    registry: RegistryUrl = RegistryUrl("redis://127.0.0.1:6379/0")
    """URL of the registry: redis://… or rediss://…; without Ray unix:///… or file:///… too."""
    listen_host: Host = "127.0.0.1"
    """Address to listen on; 0.0.0.0 = every interface, :: = the same for IPv6 as well."""
    advertise_host: Host = ""
    """Address by which others reach a service; default: listen_host, or the node's if that is every interface."""
    dtype: Dtype = "auto"
    """Data type of weights and rows: auto (as published), float32, bfloat16 or float16."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Torch device: cpu or cuda."""
    deterministic: bool = False
    """Make every output depend, bit by bit, on its request alone: not on batch, lanes, replicas or retries. On cpu only."""
    groups: int = Field(default=2, ge=1, le=4096)
    """Expert groups, one deployment each; at most the model's experts per layer."""
    slices: int = Field(default=1, ge=1, le=64)
    """Parts that every expert is cut into, each held by a group of its own, for experts too large for a device.

    1 = whole experts. The number of groups must be a multiple of it.
    """
    drain_s: float = Field(default=300.0, ge=0, le=86_400)
    """Seconds that running requests get to finish when a service or the whole system ends; an idle one ends at once."""

    @property
    def system(self) -> SystemId:
        """The identity of the system; complete once `cluster` and `revision` are set."""
        return SystemId(self.app, self.cluster, self.revision, self.groups, self.slices)

    @field_validator("deterministic")
    @classmethod
    def _on_cpu(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("device") == "cuda":
            raise ValueError("needs device cpu until every operation on cuda computes a row alike in any batch")
        return value


class RouterOptions(Options):
    """What a router can be set to."""

    threads: int = Field(default=0, ge=0, le=1024)
    """Most compute threads; 0 = every core it may use."""
    slots: int = Field(default=32, ge=1, le=4096)
    """Sequences that run at once, per router."""
    token_budget: int = Field(default=512, ge=1, le=65536)
    """Tokens per step, decode and prefill together."""
    max_context: int | None = Field(default=None, ge=1)
    """Most tokens per sequence; default: the model's limit."""
    kv_memory: Size = ByteSize(1 << 30)
    """Bytes of a router for keys, values and states, e.g. 4GiB."""
    block_tokens: int = Field(default=16, ge=1, le=1024)
    """Tokens per block of the KV cache."""
    prefix_cache: bool = True
    """Reuse keys and values between prompts with a common prefix."""
    speculative_tokens: int = Field(default=0, ge=0, le=64)
    """Tokens drafted from a sequence's own text and verified in one step; 0 = none."""
    queue_limit: int = Field(default=256, ge=1, le=1_000_000)
    """Requests that may wait for a slot before RESOURCE_EXHAUSTED."""
    expert_wait_s: float = Field(default=30.0, ge=0, le=3600)
    """Seconds to wait for a replica that holds an expert and has room, or for the late answer of the only holder."""
    hedge_after_s: float = Field(default=0.02, gt=0, le=60)
    """Least seconds before a call is sent again."""
    retry_budget: float = Field(default=0.1, ge=0, le=1)
    """Most hedges (slow calls sent to other replicas too), as a fraction of calls."""
    overflow_queue_ms: float = Field(default=100.0, gt=0, le=60_000)
    """Milliseconds of queue wait above which a queue is too long, see experts.overflow."""
    lanes: int = Field(default=0, ge=0, le=8)
    """Parts of a batch that take turns: one computes while others wait for experts; 0 = chosen by measurement."""
    transport: Transport = Transport.AUTO
    """How calls reach experts: auto = shared memory on the same node, else gRPC. Replicas out of reach are left out."""

    @field_validator("token_budget")
    @classmethod
    def _at_least_slots(cls, value: int, info: ValidationInfo) -> int:
        if value < (slots := info.data.get("slots", value)):
            raise ValueError(f"must be at least slots, {slots}, or prompts would starve")
        return value


# Names of gateway/formats besides auto and none.
ToolFormat = Literal[
    "auto",
    "none",
    "plain",
    "hermes",
    "llama",
    "llama4",
    "mistral",
    "mistral_args",
    "deepseek",
    "deepseek_v31",
    "gpt_oss",
]


class GatewayOptions(Options):
    """What a gateway can be set to."""

    port: int = Field(default=50051, ge=0, le=65535)
    """Port of the gRPC API, one per node; 0 = a free one."""
    http: bool = True
    """Offer the OpenAI HTTP API beside the gRPC API."""
    http_port: int = Field(default=DEFAULT_HTTP_PORT, ge=0, le=65535)
    """Port of the HTTP API, one per node; 0 = a free one."""
    max_concurrent: int = Field(default=1024, ge=1)
    """Requests in flight, at most, before RESOURCE_EXHAUSTED."""
    router_wait_s: float = Field(default=30.0, ge=0, le=3600)
    """Seconds to wait for a ready router."""
    tool_format: ToolFormat = "auto"
    """How the model writes reasoning and tool calls; auto: as its chat template shows, none: neither."""
    skip_tokenizer: bool = False
    """Serve token ids only, without the checkpoint's tokenizer, which may be missing or need code of its own."""
    max_connection_age_s: float = Field(default=600.0, ge=1, le=1_000_000)
    """Seconds, give or take a tenth, after which a client opens a new connection for further requests.

    Behind a load balancer of connections, such as a Kubernetes Service, new gateways get load in this way.
    """
    max_connection_age_grace_s: float | None = Field(default=None, gt=0, le=1_000_000)
    """Seconds that requests on a connection get to finish once it is too old; default: as long as they take."""

    @field_validator("http_port")
    @classmethod
    def _not_that_of_grpc(cls, value: int, info: ValidationInfo) -> int:
        if value and value == info.data.get("port") and info.data.get("http"):
            raise ValueError("is the gRPC API's port: each API needs one of its own")
        return value


class ExpertOptions(Options):
    """What a replica of an expert group or hot set can be set to."""

    threads: int = Field(default=1, ge=1, le=1024)
    """Compute threads per replica."""
    weights: Literal["auto", "int8"] = "auto"
    """Expert weights in memory: auto = as published, int8 = quantised while loading, half the size of bfloat16."""
    capacity: float | None = Field(default=None, gt=0)
    """Slow a replica down to this many rows per second, for tests on small machines; default: no limit."""
    queue_calls: int = Field(default=256, ge=1, le=65536)
    """Calls that may wait for the device."""


class Scaling(Options):
    """How a deployment scales, and what Ray reserves for each of its replicas."""

    min_replicas: MinReplicas = 1
    max_replicas: MaxReplicas = 4
    num_cpus: Cpus = 1.0
    num_gpus: float = Field(default=0.0, ge=0)
    """Ray GPUs per replica."""
    resources: Mapping[str, Annotated[float, Field(gt=0), BeforeValidator(_no_flag)]] = Field(default_factory=dict)
    """Ray's other resources per replica, which choose the node: {"node:__internal_head__": 0.001} = the head."""
    target_busy: float = Field(default=0.6, gt=0, le=1)
    """Busy fraction that scaling aims at, 0 to 1."""
    queue_wait_ms: float = Field(default=50.0, gt=0)
    """Mean queue wait in milliseconds that forces a step up."""
    shrink_after_s: float = Field(default=30.0, ge=0)
    """Seconds that load must stay low before a step down."""
    shrink_margin: float = Field(default=0.8, gt=0, lt=1)
    """A step down needs a predicted busy fraction below this fraction of target_busy."""

    def with_live(self, values: Mapping[str, float]) -> Self:
        """Returns a copy of these settings with `values` set. Raises ConfigError for a name that is not in LIVE_SETTINGS."""
        for name in values:
            if name not in LIVE_SETTINGS:
                raise ConfigError(f"user_config.{name}", values[name], f"live settings are {', '.join(LIVE_SETTINGS)}")
        return validated(type(self), {**self.model_dump(), **values}) if values else self

    @field_validator("resources")
    @classmethod
    def _as_ray_takes_them(cls, value: Mapping[str, float]) -> Mapping[str, float]:
        for name, quantity in value.items():
            if name.lower() in RESERVED:
                raise ValueError(f"{name}: {RESERVED[name.lower()]}")
            if quantity > 1 and quantity % 1:
                raise ValueError(f"{name}: {quantity}: must be a whole number where it is above 1, as Ray demands")
        return value

    @field_validator("max_replicas")
    @classmethod
    def _at_least_min_replicas(cls, value: int, info: ValidationInfo) -> int:
        if value < (minimum := info.data.get("min_replicas", value)):
            raise ValueError(f"must be at least min_replicas, {minimum}")
        return value
