"""Errors: their messages, and their gRPC status codes on both sides of a call."""

from __future__ import annotations

import grpc
import pytest

from moiety import errors
from moiety.core.visible import visible
from moiety.wire import status

SAMPLES: dict[errors.MoietyError, grpc.StatusCode] = {
    errors.InvalidRequest("top_p", 2, "above 0, up to 1"): grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound("no such model"): grpc.StatusCode.NOT_FOUND,
    errors.ResourceExhausted("full", 0.25): grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.DeadlineExceeded("late"): grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Cancelled("gone"): grpc.StatusCode.CANCELLED,
    errors.ConfigError("slots", 0, "at least 1"): grpc.StatusCode.FAILED_PRECONDITION,
    errors.CheckpointError("corrupt"): grpc.StatusCode.FAILED_PRECONDITION,
    errors.NoHolder(3, [1, 2], 30.0): grpc.StatusCode.UNAVAILABLE,
    errors.RegistryUnreachable("down"): grpc.StatusCode.UNAVAILABLE,
    errors.PeerLost("broke"): grpc.StatusCode.UNAVAILABLE,
    errors.NotHeld("elsewhere"): grpc.StatusCode.FAILED_PRECONDITION,
    errors.HopFailed([0], errors.NoHolder(3, [1], 1.0)): grpc.StatusCode.INTERNAL,
    errors.MoietyError("a bug"): grpc.StatusCode.INTERNAL,
}


@pytest.mark.parametrize(("error", "code"), SAMPLES.items(), ids=lambda value: type(value).__name__)
def test_an_error_survives_a_call(error: errors.MoietyError, code: grpc.StatusCode):
    """Every error has its status code, and becomes an error of that code with the same message again."""
    assert status.code_of(error) is code
    relayed = status.error_of_code(code, str(error))
    assert status.code_of(relayed) is code
    assert str(relayed) == str(error)


def test_a_retry_hint_is_relayed():
    """ResourceExhausted takes its retry delay from the trailing metadata; without a number there it is one second."""
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    assert status.error_of_code(code, "full", ((status.RETRY_AFTER_KEY, "250"),)).retry_after_s == 0.25
    assert status.error_of_code(code, "full").retry_after_s == 1.0
    assert status.error_of_code(code, "full", ((status.RETRY_AFTER_KEY, "soon"),)).retry_after_s == 1.0


class FailedCall(grpc.RpcError):
    """What grpc raises for a call that ended with a status."""

    def __init__(self, code: grpc.StatusCode, details: str, metadata: tuple[tuple[str, str], ...] = ()):
        self.code, self.details, self.trailing_metadata = lambda: code, lambda: details, lambda: metadata


def test_a_refusal_that_quotes_a_client_is_not_taken_for_grpcs_words():
    """gRPC's sentences about connections are put in plain words; a service's message that holds such words stays."""
    refusal = "sampling.stop = 'keepalive': must be absent"
    written = ((status.WRITTEN_KEY, "1"),)
    assert str(status.error_of(FailedCall(grpc.StatusCode.INVALID_ARGUMENT, refusal, written))) == refusal
    lost = "registry redis://127.0.0.1:1/0: Connection refused"
    assert str(status.error_of(FailedCall(grpc.StatusCode.UNAVAILABLE, lost, written))) == lost
    assert str(status.error_of(FailedCall(grpc.StatusCode.UNAVAILABLE, "keepalive watchdog timeout"))).startswith(
        "the connection broke"
    )


def test_foreign_errors_are_internal():
    """An error of another library is INTERNAL, without its text; an unknown status code becomes a plain MoietyError."""
    seen = visible(KeyError("secret"), "r-1")
    assert status.code_of(seen) is grpc.StatusCode.INTERNAL
    assert "secret" not in str(seen)
    assert "r-1" in str(seen)
    assert type(status.error_of_code(grpc.StatusCode.UNIMPLEMENTED, "")) is errors.MoietyError


def test_messages_name_field_value_and_bound():
    """A message names the field, the value and what is allowed; a long value is shortened."""
    assert str(errors.InvalidRequest("top_k", -1, "0 to 5")) == "top_k = -1: must be 0 to 5"
    assert str(errors.ConfigError("slots", 0, "at least 1")) == "setting slots = 0: at least 1"
    assert str(errors.ResourceExhausted("full", 0.05)) == "full; retry in 0.05 s"
    assert "expert(s) [1, 2] of MoE layer 3; waited 30.0 s" in str(errors.NoHolder(3, [1, 2], 30.0))
    assert len(str(errors.InvalidRequest("request_id", "x" * 10**6, "short"))) < 120
