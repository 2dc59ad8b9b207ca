"""Requests that resume after the loss of their router: one for each unfinished choice, and their merged events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from moiety.core.supervise import spawn
from moiety.internal.v1 import engine_pb2


def choices_of(request: engine_pb2.EngineRequest) -> range:
    """Returns the choices that an engine request asks for."""
    return range(request.choice, request.choice + max(request.sampling.n, 1))


def resumed_request(request: engine_pb2.EngineRequest, choice: int, ids: Sequence[int]) -> engine_pb2.EngineRequest:
    """Returns a request for one choice of `request`, which resumes after the tokens `ids` that were already sent."""
    resumed = engine_pb2.EngineRequest()
    resumed.CopyFrom(request)
    resumed.choice, resumed.sampling.n = choice, 1
    resumed.generated_ids[:] = ids
    return resumed


async def merge_streams(
    streams: Sequence[AsyncGenerator[engine_pb2.EngineEvent, None]],
) -> AsyncGenerator[engine_pb2.EngineEvent, None]:
    """Yields the events of all streams as they arrive. The first error ends all streams and is raised.

    At most one event of each waits to be taken: the others stay where their number is bounded (wire/event_stream/inbox.py).
    """
    events: asyncio.Queue[engine_pb2.EngineEvent | Exception | None] = asyncio.Queue(1)

    async def follow(stream: AsyncGenerator[engine_pb2.EngineEvent, None]) -> None:
        try:
            async with aclosing(stream):
                async for event in stream:
                    await events.put(event)
            await events.put(None)
        except Exception as error:
            await events.put(error)

    tasks = [spawn("choice", follow(stream)) for stream in streams]
    try:
        running = len(tasks)
        while running:
            event = await events.get()
            if isinstance(event, Exception):
                raise event
            if event is None:
                running -= 1
            else:
                yield event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
