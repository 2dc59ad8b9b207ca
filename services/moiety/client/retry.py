"""Retries requests that a full queue refused, after the gateway's retry delay and a random extra.

A request that has got a response is not sent again: its tokens would come twice.

Each wait is the refusal's retry delay times a random factor from 1 to 1.5. So no retry comes before the peer expects to
have room, and clients that were refused together do not return together.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Callable, Generator
from typing import Any

import grpc

from moiety.errors import MoietyError, ResourceExhausted
from moiety.wire.deadline import Deadline

# Returns the error that a failed call stands for, after so many tokens.
FailureOf = Callable[[grpc.RpcError, int], MoietyError]


async def stream_with_retries(
    call: Callable[[float | None], Any], retries: int, timeout_s: float | None, failure_of: FailureOf
) -> AsyncGenerator[Any, None]:
    """Yields the responses of `call(seconds left)`, a call of grpc.aio. Calls again after ResourceExhausted.

    It does so up to `retries` times. Raises the error that `failure_of` returns, also where a wait would exceed `timeout_s`.
    """
    deadline = Deadline.after(timeout_s)
    while True:
        streaming, begun, tokens = call(None if timeout_s is None else deadline.left()), False, 0
        try:
            async for response in streaming:
                begun, tokens = True, tokens + len(response.token_ids)
                yield response
            return
        except grpc.RpcError as error:
            wait_s = _wait_s(failure_of(error, tokens), 0 if begun else retries, deadline)
        finally:
            streaming.cancel()
        retries -= 1
        await asyncio.sleep(wait_s)


def iterate_with_retries(
    call: Callable[[float | None], Any], retries: int, timeout_s: float | None, failure_of: FailureOf
) -> Generator[Any, None, None]:
    """Does what `stream_with_retries` does, for a call of grpc's synchronous API. Blocks while it waits."""
    deadline = Deadline.after(timeout_s)
    while True:
        streaming, begun, tokens = call(None if timeout_s is None else deadline.left()), False, 0
        try:
            for response in streaming:
                begun, tokens = True, tokens + len(response.token_ids)
                yield response
            return
        except grpc.RpcError as error:
            wait_s = _wait_s(failure_of(error, tokens), 0 if begun else retries, deadline)
        finally:
            streaming.cancel()
        retries -= 1
        time.sleep(wait_s)


def _wait_s(cause: MoietyError, retries: int, deadline: Deadline) -> float:
    """Returns the seconds until the request may be sent again. Raises `cause` if it may not."""
    if not isinstance(cause, ResourceExhausted) or retries <= 0:
        raise cause from None
    wait_s = cause.retry_after_s * random.uniform(1.0, 1.5)
    if wait_s >= deadline.left():
        raise cause from None
    return wait_s
