"""Several streams as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import TypeVar

Item = TypeVar("Item")


async def merged(streams: Sequence[AsyncGenerator[Item, None]]) -> AsyncGenerator[Item, None]:
    """What `streams` yield, as it comes, until all have ended. The first that fails ends the others, as leaving does."""
    arrived: asyncio.Queue[Item | None] = asyncio.Queue()

    async def follow(stream: AsyncGenerator[Item, None]) -> None:
        async for item in stream:
            arrived.put_nowait(item)

    async def follow_all() -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                for stream in streams:
                    tasks.create_task(follow(stream))
        finally:
            arrived.put_nowait(None)

    following = asyncio.create_task(follow_all())
    try:
        while (item := await arrived.get()) is not None:
            yield item
    finally:
        following.cancel()
        await asyncio.wait([following])
    if not following.cancelled() and isinstance(failed := following.exception(), BaseExceptionGroup):
        raise failed.exceptions[0]
