"""The load under which faults happen: greedy and seeded streams without a pause, each compared with a quiet run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from moiety.client import Client
from moiety.core.supervise import spawn
from moiety.errors import MoietyError, Unavailable

NEW_TOKENS = 120  # per request
AFTERWARDS_TOKENS = 16  # per request after a fault
FAILED_S = 0.2  # between a request that failed and the next one
DRAIN_S = 120.0  # longest wait for the last streams of a trial
PROMPTS = tuple(tuple(3 + (7 * i + 11 * j) % 250 for j in range(4 + 3 * i)) for i in range(8))
# Eight greedy streams, and four with a temperature and a seed.
MIX: Sequence[tuple[Sequence[int], Mapping[str, Any]]] = (
    *((prompt, {}) for prompt in PROMPTS),
    *((prompt, {"temperature": 0.9, "seed": 100 + i}) for i, prompt in enumerate(PROMPTS[:4])),
)


@dataclass(slots=True)
class Tally:
    """What became of the requests of one trial."""

    requests: int = 0
    identical: int = 0  # of those that did not fail
    errors: list[MoietyError] = field(default_factory=list)  # of those that failed
    worst_gap_s: float = 0.0  # that a stream waited for its next token, the first included
    tokens: int = 0
    seconds: float = 0.0

    @property
    def failed(self) -> int:
        return len(self.errors)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class Load:
    """Streams that run one after another in each of len(MIX) lanes, through one gateway."""

    def __init__(self, client: Client, mix: Sequence[tuple[Sequence[int], Mapping[str, Any]]] = MIX) -> None:
        self._client, self._mix = client, mix
        self._expected: list[list[int]] = []
        self._produced: list[int] = []  # by lane: tokens since the trial began
        self._progress = asyncio.Event()

    async def learn(self) -> Tally:
        """Runs every lane once without a fault, to learn the tokens. Raises the error of a request that fails."""
        began = time.monotonic()
        tally = Tally()
        outputs: list[list[int]] = [[] for _ in self._mix]
        self._produced = [0] * len(self._mix)
        async with asyncio.TaskGroup() as lanes:
            for lane in range(len(self._mix)):
                lanes.create_task(self._request(lane, tally, outputs[lane]))
        tally.seconds = time.monotonic() - began
        self._expected = outputs
        return tally

    async def check(self) -> Tally:
        """Runs the beginning of every stream once, after a fault. Returns the tally; a request that fails is counted."""
        tally = Tally()
        async with asyncio.TaskGroup() as lanes:
            for lane in range(len(self._mix)):
                lanes.create_task(self._counted(lane, tally, AFTERWARDS_TOKENS))
        return tally

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Tally]:
        """Keeps every lane busy while the block runs, then waits for the last streams. Yields the tally, complete at the end.

        Raises Unavailable if a stream has not ended after DRAIN_S.
        """
        tally, ending, began = Tally(), asyncio.Event(), time.monotonic()
        self._produced = [0] * len(self._mix)
        lanes = [spawn("load", self._lane(lane, tally, ending)) for lane in range(len(self._mix))]
        try:
            yield tally
            ending.set()
            _, late = await asyncio.wait(lanes, timeout=DRAIN_S)
            if late:
                raise Unavailable(f"{len(late)} of {len(lanes)} streams have not ended after {DRAIN_S:g} s")
        finally:
            for task in lanes:
                task.cancel()
            await asyncio.gather(*lanes, return_exceptions=True)
            tally.seconds = time.monotonic() - began

    async def until(self, tokens: int, timeout_s: float) -> None:
        """Waits until every lane has produced `tokens` tokens in this trial. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while min(self._produced) < tokens:
                self._progress.clear()
                await self._progress.wait()

    async def _lane(self, lane: int, tally: Tally, ending: asyncio.Event) -> None:
        while not ending.is_set():
            if not await self._counted(lane, tally, NEW_TOKENS):
                await asyncio.sleep(FAILED_S)  # the next request may fail as soon

    async def _counted(self, lane: int, tally: Tally, new_tokens: int) -> bool:
        """Runs one request of `lane` and counts it in `tally`; returns whether it succeeded."""
        output: list[int] = []
        tally.requests += 1
        try:
            await self._request(lane, tally, output, new_tokens)
        except MoietyError as error:
            tally.errors.append(error)
            return False
        tally.identical += output == self._expected[lane][:new_tokens]
        return True

    async def _request(self, lane: int, tally: Tally, output: list[int], new_tokens: int = NEW_TOKENS) -> None:
        """Runs one request of `lane`, adds its tokens to `output` and its longest gap to `tally`."""
        prompt, options = self._mix[lane]
        latest = time.monotonic()
        try:
            async for chunk in self._client.generate(prompt, max_tokens=new_tokens, ignore_eos=True, **options):
                now = time.monotonic()
                tally.worst_gap_s, latest = max(tally.worst_gap_s, now - latest), now
                output.extend(chunk.token_ids)
                tally.tokens += len(chunk.token_ids)
                self._produced[lane] += len(chunk.token_ids)
                self._progress.set()
        finally:
            tally.worst_gap_s = max(tally.worst_gap_s, time.monotonic() - latest)
