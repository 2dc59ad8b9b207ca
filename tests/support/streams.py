"""Concurrent generations for the fault tests, with the time at which each chunk of tokens came."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from moiety.client import Client

PROMPTS = tuple(tuple(3 + (7 * i + 11 * j) % 250 for j in range(4 + 3 * i)) for i in range(8))


@dataclass
class Stream:
    """One running generation."""

    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # time.monotonic() of each chunk

    @property
    def worst_gap(self) -> float:
        """The longest time between two chunks, in seconds."""
        return max(b - a for a, b in zip(self.times, self.times[1:], strict=False))


class Streams:
    """Runs one generation per prompt, all at once; by default the eight of PROMPTS."""

    def __init__(self, client: Client, new_tokens: int, prompts: Sequence[Sequence[int]] = PROMPTS) -> None:
        self.streams = [Stream() for _ in prompts]
        self._arrived = asyncio.Event()
        self._tasks = [
            asyncio.create_task(self._run(client, prompt, stream, new_tokens))
            for prompt, stream in zip(prompts, self.streams, strict=True)
        ]

    async def wait_for_tokens(self, tokens: int, timeout_s: float = 60.0) -> None:
        """Waits until every stream has at least `tokens` tokens. Raises the error of a stream that fails before."""
        async with asyncio.timeout(timeout_s):
            while any(len(stream.tokens) < tokens for stream in self.streams):
                if failed := next((t for t in self._tasks if t.done() and t.exception()), None):
                    failed.result()
                self._arrived.clear()
                await self._arrived.wait()

    async def finish(self, timeout_s: float = 100.0) -> list[list[int]]:
        """Waits until all streams have ended and returns the tokens of each. Raises the error of a stream that failed."""
        async with asyncio.timeout(timeout_s):
            await asyncio.gather(*self._tasks)
        return [stream.tokens for stream in self.streams]

    @property
    def worst_gap(self) -> float:
        """The longest time between two chunks of any stream, in seconds."""
        return max(stream.worst_gap for stream in self.streams)

    async def _run(self, client: Client, prompt: Sequence[int], stream: Stream, new_tokens: int) -> None:
        try:
            async for chunk in client.generate(prompt, max_tokens=new_tokens, ignore_eos=True):
                stream.tokens.extend(chunk.token_ids)
                stream.times.append(time.monotonic())
                self._arrived.set()
        finally:
            self._arrived.set()
