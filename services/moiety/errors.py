"""The exception tree. Nothing here knows gRPC; `wire/status.py` maps the errors to gRPC status codes.

MoietyError
├── InvalidRequest           a client's value is out of bounds: names field, value and bound
├── NotFound                 an unknown model
├── ResourceExhausted        a bounded queue is full: carries a retry hint
├── DeadlineExceeded         the request's own deadline has passed
├── Cancelled                the client went away
├── FailedPrecondition       the system, as it is configured, cannot do what was requested
│   ├── ConfigError          a setting is wrong: names field, value and bound
│   └── CheckpointError      a checkpoint is missing, corrupt or unsupported
├── Unavailable              something that is needed is missing for now
│   ├── RegistryUnreachable  Redis (or the registry file) does not answer
│   │   └── WritesRefused    Redis answers, but takes no writes
│   ├── PeerLost             a replica has left, or its stream broke
│   └── NoHolder             no live replica holds an expert that a token needs
├── HopFailed                a layer could not be computed for some tokens of a step
├── WrongSystem              a peer belongs to another system: another model, say, or other expert groups
└── CallRejected             an expert replica refused a whole call
    └── NotHeld              it lacks a (layer, expert) pair that the call names
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Final

NOT_SHOWN: Final = object()


class MoietyError(Exception):
    """Every error that Moiety raises on purpose."""


class InvalidRequest(MoietyError):
    """A client's value is out of bounds."""

    def __init__(self, field: str, value: object, bound: str) -> None:
        self.field, self.value, self.bound = field, value, bound
        super().__init__(f"{field} = {shown(value)}: must be {bound}")


class NotFound(MoietyError):
    """A request names a model that this system does not serve."""


class ResourceExhausted(MoietyError):
    """A bounded queue is full."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(f"{message}; retry in {retry_after_s:g} s")


class DeadlineExceeded(MoietyError):
    """A request's deadline passed before the request had finished."""


class Cancelled(MoietyError):
    """The client cancelled, or the service is shutting down."""


class FailedPrecondition(MoietyError):
    """The system, as it is configured, cannot do what was requested."""


class ConfigError(FailedPrecondition):
    """A setting is wrong. NOT_SHOWN as its value: there is none, or it may be a secret."""

    def __init__(self, field: str, value: object, bound: str) -> None:
        self.field, self.value, self.bound = field, value, bound
        given = "" if value is NOT_SHOWN else f" = {shown(value)}"
        super().__init__(f"setting {field}{given}: {bound}")


class CheckpointError(FailedPrecondition):
    """A checkpoint is missing, corrupt or unsupported."""


class Unavailable(MoietyError):
    """Something that is needed is missing for now; the same request may succeed later."""


class RegistryUnreachable(Unavailable):
    """The registry does not answer. Readers keep using the replicas and the placement that they read last."""


class WritesRefused(RegistryUnreachable):
    """The registry answers reads but refuses writes, so entries expire though their services live."""


class PeerLost(Unavailable):
    """A replica has left, or the stream to it broke, before it answered a call."""


class NoHolder(Unavailable):
    """No live replica holds the `experts` of MoE layer `layer`, and waiting for such a replica took too long."""

    def __init__(self, layer: int, experts: list[int], waited_s: float) -> None:
        self.layer, self.experts, self.waited_s = layer, experts, waited_s
        super().__init__(
            f"no live replica holds expert(s) {experts} of MoE layer {layer}; waited {waited_s:.1f} s for one"
        )


class HopFailed(MoietyError):
    """A MoE layer could not be computed for some `tokens` of a step. It is not tried again: these tokens' requests end."""

    def __init__(self, tokens: list[int], cause: MoietyError) -> None:
        self.tokens, self.cause = tokens, cause  # positions in the step's packed batch
        super().__init__(f"{len(tokens)} token(s) of the step: {cause}")


class CallRejected(MoietyError):
    """An expert replica refused a whole call and computed nothing of it."""


class NotHeld(CallRejected):
    """The replica lacks a (layer, expert) pair that the call names."""


class WrongSystem(MoietyError):
    """A peer belongs to another system, see core/system.py. Nothing was computed."""


def shown(value: object) -> str:
    """Returns a value, cut: a text and a number as they are, all else as JSON and YAML have it, such as null and true."""
    text = repr(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        with suppress(TypeError, ValueError, RecursionError):  # it has other keys than texts, or holds itself
            text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}…"
