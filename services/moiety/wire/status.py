"""Maps our errors (errors.py) to gRPC status codes and back. Elsewhere the services handle only our errors."""

from __future__ import annotations

from typing import NoReturn, TypeVar

import grpc

from moiety import errors
from moiety.internal.v1 import engine_pb2
from moiety.wire.grpc_words import in_words

T = TypeVar("T")

RETRY_AFTER_KEY = "retry-after-ms"
# In the trailing metadata of a status whose details a service wrote. They may quote gRPC, or a client's text.
WRITTEN_KEY = "written-by-service"

# The first class that fits wins: a derived class with a code of its own stands before its base.
_CODES: tuple[tuple[type[errors.MoietyError], grpc.StatusCode], ...] = (
    (errors.InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.NotFound, grpc.StatusCode.NOT_FOUND),
    (errors.ResourceExhausted, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
    (errors.Cancelled, grpc.StatusCode.CANCELLED),
    (errors.FailedPrecondition, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.CallRejected, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.WrongSystem, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.Unavailable, grpc.StatusCode.UNAVAILABLE),
    (errors.MoietyError, grpc.StatusCode.INTERNAL),
)
_BY_NUMBER = {code.value[0]: code for code in grpc.StatusCode}


def code_of(error: errors.MoietyError) -> grpc.StatusCode:
    """Returns the gRPC status code that a client sees for `error`."""
    return next(code for kind, code in _CODES if isinstance(error, kind))


async def abort(context: grpc.aio.ServicerContext, error: errors.MoietyError) -> NoReturn:
    """Ends the RPC with the status of `error`."""
    metadata = [(WRITTEN_KEY, "1")]
    if isinstance(error, errors.ResourceExhausted):
        metadata.append((RETRY_AFTER_KEY, str(int(error.retry_after_s * 1000))))
    context.set_trailing_metadata(tuple(metadata))
    await context.abort(code_of(error), str(error))
    raise AssertionError("abort returned")


def error_of(rpc: grpc.RpcError) -> errors.MoietyError:
    """Returns the MoietyError that a failed RPC stands for, with the peer's message, or gRPC's own in plain words."""
    details, metadata = rpc.details() or "", rpc.trailing_metadata()
    written = WRITTEN_KEY in dict(metadata or ())
    return error_of_code(rpc.code(), details if written else in_words(details), metadata)


def parsed(response: T | None) -> T:
    """Returns `response`. Raises PeerLost where it is None, which grpc.aio returns for bytes that it cannot parse."""
    if response is None:
        raise errors.PeerLost("its answer cannot be parsed")
    return response


def to_message(error: errors.MoietyError) -> engine_pb2.EngineError:
    """Returns `error` as an EngineError. It ends one call, whereas a gRPC status would end the stream with all its calls."""
    message = engine_pb2.EngineError(code=code_of(error).value[0], detail=str(error))
    if isinstance(error, errors.ResourceExhausted):
        message.retry_after_ms = int(error.retry_after_s * 1000)
    return message


def error_of_message(message: engine_pb2.EngineError) -> errors.MoietyError:
    """Returns the MoietyError that a peer's EngineError stands for, with the peer's message."""
    code = _BY_NUMBER.get(message.code, grpc.StatusCode.UNKNOWN)
    return error_of_code(code, message.detail, ((RETRY_AFTER_KEY, str(message.retry_after_ms)),))


def error_of_code(code: grpc.StatusCode, details: str, metadata: object = None) -> errors.MoietyError:
    """Returns the MoietyError that a status code stands for, with `details` as its message.

    `metadata`: the trailing metadata, which carries the retry delay of RESOURCE_EXHAUSTED.
    """
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return _relayed(errors.InvalidRequest, details)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        error = _relayed(errors.ResourceExhausted, details)
        error.retry_after_s = _retry_after_s(metadata)  # type: ignore[attr-defined]
        return error
    simple: dict[grpc.StatusCode, type[errors.MoietyError]] = {
        grpc.StatusCode.NOT_FOUND: errors.NotFound,
        grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
        grpc.StatusCode.CANCELLED: errors.Cancelled,
        grpc.StatusCode.FAILED_PRECONDITION: errors.FailedPrecondition,
        grpc.StatusCode.UNAVAILABLE: errors.PeerLost,
    }
    return simple.get(code, errors.MoietyError)(details or code.name)


def _retry_after_s(metadata: object) -> float:
    """Returns the retry delay in a peer's trailing metadata, in seconds; 1 if the peer sent none, or no number."""
    hints = dict(metadata) if metadata else {}  # type: ignore[call-overload]
    try:
        return int(hints.get(RETRY_AFTER_KEY, 1000)) / 1000
    except ValueError:
        return 1.0


def _relayed(kind: type[errors.MoietyError], details: str) -> errors.MoietyError:
    """Returns an error of type `kind` with a peer's message. Skips the constructor, which would compose a new message."""
    error = kind.__new__(kind)
    Exception.__init__(error, details)
    return error
