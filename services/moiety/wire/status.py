"""The only place that knows gRPC status codes: our errors to codes, and a peer's codes back to our errors."""

from __future__ import annotations

import logging
from typing import NoReturn

import grpc

from moiety import errors
from moiety.internal.v1 import engine_pb2

_log = logging.getLogger(__name__)

RETRY_AFTER_KEY = "retry-after-ms"

# The most derived class that fits wins; order matters.
_CODES: tuple[tuple[type[errors.MoietyError], grpc.StatusCode], ...] = (
    (errors.InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.NotFound, grpc.StatusCode.NOT_FOUND),
    (errors.ResourceExhausted, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
    (errors.Cancelled, grpc.StatusCode.CANCELLED),
    (errors.FailedPrecondition, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.CallRejected, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.Unavailable, grpc.StatusCode.UNAVAILABLE),
    (errors.MoietyError, grpc.StatusCode.INTERNAL),
)
_BY_NUMBER = {code.value[0]: code for code in grpc.StatusCode}


def code_of(error: BaseException) -> grpc.StatusCode:
    """The status code a client sees for `error`; anything that is not ours is INTERNAL."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), grpc.StatusCode.INTERNAL)


async def abort(context: grpc.aio.ServicerContext, error: BaseException) -> NoReturn:
    """Ends the RPC with `error`. Our bugs are logged here with their trace, and told without it."""
    if isinstance(error, errors.ResourceExhausted):
        context.set_trailing_metadata(((RETRY_AFTER_KEY, str(int(error.retry_after_s * 1000))),))
    if isinstance(error, errors.MoietyError):
        await context.abort(code_of(error), str(error))
    _log.error("unexpected error in an RPC", exc_info=error)
    await context.abort(grpc.StatusCode.INTERNAL, f"internal error: {type(error).__name__}")
    raise AssertionError("abort returned")


def error_of(rpc: grpc.RpcError) -> errors.MoietyError:
    """The error that a peer meant, with the peer's own words."""
    return error_of_code(rpc.code(), rpc.details() or "", rpc.trailing_metadata())


def to_message(error: BaseException) -> engine_pb2.EngineError:
    """`error` where many calls share one stream, and none may end it."""
    message = engine_pb2.EngineError(code=code_of(error).value[0], detail=str(error))
    if isinstance(error, errors.ResourceExhausted):
        message.retry_after_ms = int(error.retry_after_s * 1000)
    if not isinstance(error, errors.MoietyError):
        _log.error("unexpected error in a call", exc_info=error)
        message.detail = f"internal error: {type(error).__name__}"
    return message


def error_of_message(message: engine_pb2.EngineError) -> errors.MoietyError:
    """The error that a peer meant, with the peer's own words."""
    code = _BY_NUMBER.get(message.code, grpc.StatusCode.UNKNOWN)
    return error_of_code(code, message.detail, ((RETRY_AFTER_KEY, str(message.retry_after_ms)),))


def error_of_code(code: grpc.StatusCode, details: str, metadata: object = None) -> errors.MoietyError:
    """As `error_of`, from the parts of a status."""
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return _relayed(errors.InvalidRequest, details)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        hints = dict(metadata) if metadata else {}  # type: ignore[call-overload]
        error = _relayed(errors.ResourceExhausted, details)
        error.retry_after_s = int(hints.get(RETRY_AFTER_KEY, 1000)) / 1000  # type: ignore[attr-defined]
        return error
    simple: dict[grpc.StatusCode, type[errors.MoietyError]] = {
        grpc.StatusCode.NOT_FOUND: errors.NotFound,
        grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
        grpc.StatusCode.CANCELLED: errors.Cancelled,
        grpc.StatusCode.FAILED_PRECONDITION: errors.FailedPrecondition,
        grpc.StatusCode.UNAVAILABLE: errors.PeerLost,
    }
    return simple.get(code, errors.MoietyError)(details or code.name)


def _relayed(kind: type[errors.MoietyError], details: str) -> errors.MoietyError:
    """An error whose parts a peer has already put into words: built without its constructor."""
    error = kind.__new__(kind)
    Exception.__init__(error, details)
    return error
