"""Coming again after a refusal for want of room, when the gateway says so and not all at once."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable
from typing import Any

import grpc

from moiety.errors import ResourceExhausted
from moiety.wire import status
from moiety.wire.deadline import Deadline


async def persistent(
    call: Callable[[float | None], Any], retries: int, timeout_s: float | None
) -> AsyncGenerator[Any, None]:
    """What `call(seconds left)` streams. Refused with ResourceExhausted, it is made again, up to `retries` times.

    Each wait is the hint that came with the refusal, times 1 to 1.5 at random: never before there is room, and spread
    out, so that those who were refused together do not come together. A wait that would outlast `timeout_s` is not
    begun. Raises the error that the peer told (errors.py).
    """
    deadline = Deadline.after(timeout_s)
    while True:
        streaming = call(None if timeout_s is None else deadline.left())
        try:
            async for response in streaming:
                yield response
            return
        except grpc.RpcError as error:
            told = status.error_of(error)
            if not isinstance(told, ResourceExhausted) or retries <= 0:
                raise told from None
            wait_s = told.retry_after_s * random.uniform(1.0, 1.5)
            if wait_s >= deadline.left():
                raise told from None
        finally:
            streaming.cancel()
        retries -= 1
        await asyncio.sleep(wait_s)
