"""Merges several streams of one request into one, as their items arrive."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

from moiety.core.supervise import spawn

T = TypeVar("T")


async def merge_streams(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """Yields the items of all streams as they arrive. The first error ends all streams and is raised.

    At most one item of each waits to be taken: the others stay where their number is bounded (wire/event_stream/inbox.py).
    """
    items: asyncio.Queue[T | Exception | None] = asyncio.Queue(1)

    async def follow(stream: AsyncGenerator[T, None]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    await items.put(item)
            await items.put(None)
        except Exception as error:
            await items.put(error)

    tasks = [spawn("choice", follow(stream)) for stream in streams]
    try:
        running = len(tasks)
        while running:
            item = await items.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
