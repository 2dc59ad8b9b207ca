"""What a client's errors say beside the gateway's message: which gateway, which call, how long it took, what had arrived."""

from __future__ import annotations

import grpc

from moiety.errors import DeadlineExceeded, MoietyError, Unavailable
from moiety.wire import status


def failure(error: grpc.RpcError, address: str, call: str, timeout_s: float | None, tokens: int = 0) -> MoietyError:
    """Returns the error of errors.py that a failed `call` to the gateway at `address` stands for.

    `timeout_s`: of the whole request. `tokens`: how many had arrived. An error that is about the request alone keeps the
    gateway's message.
    """
    cause = status.error_of(error)
    if isinstance(cause, DeadlineExceeded):
        limit = "" if timeout_s is None else f" within its timeout of {timeout_s:g} s"
        arrived = f"{tokens} tokens had arrived" if tokens else "nothing had arrived"
        of_service = error.details() == str(cause)  # gRPC's own words add nothing
        said = f": {cause}" if of_service else ""
        return DeadlineExceeded(f"gateway {address}: {call} was not done{limit}; {arrived}{said}")
    if isinstance(cause, Unavailable) or error.code() is grpc.StatusCode.UNIMPLEMENTED:
        after = f"; {tokens} tokens had arrived" if tokens else ""
        cause.args = (f"gateway {address}: {cause}{after}",)
    return cause
