"""Retries requests that a full queue refused, after the gateway's retry delay and a random extra."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable
from typing import Any

import grpc

from moiety.errors import ResourceExhausted
from moiety.wire import status
from moiety.wire.deadline import Deadline


async def stream_with_retries(
    call: Callable[[float | None], Any], retries: int, timeout_s: float | None
) -> AsyncGenerator[Any, None]:
    """Yields the responses of `call(seconds left)`. Calls again after ResourceExhausted, up to `retries` times.

    A request that has got a response is not sent again: its tokens would come twice.

    Each wait is the refusal's retry delay times a random factor from 1 to 1.5. So no retry comes before the peer expects to
    have room, and clients that were refused together do not return together. Raises the peer's error (errors.py), also
    where the wait would exceed `timeout_s`.
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
            cause = status.error_of(error)
            if not isinstance(cause, ResourceExhausted) or begun or retries <= 0:
                raise cause from None
            wait_s = cause.retry_after_s * random.uniform(1.0, 1.5)
            if wait_s >= deadline.left():
                raise cause from None
        finally:
            streaming.cancel()
        retries -= 1
        await asyncio.sleep(wait_s)
