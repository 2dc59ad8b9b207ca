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

from moiety.errors import ResourceExhausted
from moiety.wire import status
from moiety.wire.deadline import Deadline


async def stream_with_retries(
    call: Callable[[float | None], Any], retries: int, timeout_s: float | None
) -> AsyncGenerator[Any, None]:
    """Yields the responses of `call(seconds left)`, a call of grpc.aio. Calls again after ResourceExhausted.

    It does so up to `retries` times. Raises the peer's error (errors.py), also where a wait would exceed `timeout_s`.
    """
    deadline = Deadline.after(timeout_s)
    while True:
        streaming, begun = call(None if timeout_s is None else deadline.left()), False
        try:
            async for response in streaming:
                begun = True
                yield response
            return
        except grpc.RpcError as error:
            wait_s = _wait_s(error, 0 if begun else retries, deadline)
        finally:
            streaming.cancel()
        retries -= 1
        await asyncio.sleep(wait_s)


def iterate_with_retries(
    call: Callable[[float | None], Any], retries: int, timeout_s: float | None
) -> Generator[Any, None, None]:
    """Does what `stream_with_retries` does, for a call of grpc's synchronous API. Blocks while it waits."""
    deadline = Deadline.after(timeout_s)
    while True:
        streaming, begun = call(None if timeout_s is None else deadline.left()), False
        try:
            for response in streaming:
                begun = True
                yield response
            return
        except grpc.RpcError as error:
            wait_s = _wait_s(error, 0 if begun else retries, deadline)
        finally:
            streaming.cancel()
        retries -= 1
        time.sleep(wait_s)


def _wait_s(error: grpc.RpcError, retries: int, deadline: Deadline) -> float:
    """Returns the seconds until the request may be sent again. Raises the peer's error if it may not."""
    cause = status.error_of(error)
    if not isinstance(cause, ResourceExhausted) or retries <= 0:
        raise cause from None
    wait_s = cause.retry_after_s * random.uniform(1.0, 1.5)
    if wait_s >= deadline.left():
        raise cause from None
    return wait_s
