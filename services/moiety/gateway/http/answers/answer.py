"""What the answers of both APIs have in common: their head, token counts, and how they are sent."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Protocol

from moiety.core.supervise import spawn
from moiety.core.visible import visible
from moiety.gateway.core import GenerationCore
from moiety.gateway.http.errors import problem_of
from moiety.gateway.http.exchange import Exchange, event
from moiety.gateway.merge import merge_streams
from moiety.gateway.request import Delta, GenerationRequest
from moiety.gateway.unread import Readers, Unread
from moiety.wire.deadline import Deadline

FIRST_S = 1.0  # so long an error may still become the response's status
QUEUED_S = 5.0  # between two signs of life while a request waits; proxies cut connections that are silent for longer
PROMPTS_AT_ONCE = 16  # of one request; each takes a place in admission
_QUEUED = b": queued\n\n"
_DONE = b"data: [DONE]\n\n"
_encode = json.JSONEncoder(separators=(",", ":")).encode


class Answer(Protocol):
    """Turns deltas into an API's answer."""

    def chunk(self, delta: Delta) -> bytes:
        """Returns the server-sent event of a delta; b"" where it shows nothing."""
        ...

    def end(self) -> bytes:
        """Returns the events after the last delta."""
        ...

    def add(self, delta: Delta) -> None:
        """Takes up a delta of an answer that is sent as a whole."""
        ...

    def whole(self) -> dict[str, Any]:
        """Returns the answer made of all deltas."""
        ...


class Head:
    """What every chunk of an answer says."""

    def __init__(self, kind: str, answer_id: str, model: str, revision: str):
        """`kind`: the `object` of the answer."""
        self.fields = {
            "id": answer_id,
            "object": kind,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": f"fp_{revision[:12]}",
        }
        self._bytes = b"data: " + _encode(self.fields)[:-1].encode()  # encoded once, not for each token

    def event(self, choices: list[dict[str, Any]], **others: Any) -> bytes:
        """Returns a server-sent event with `choices`."""
        more = f",{_encode(others)[1:-1]}" if others else ""
        return self._bytes + f',"choices":{_encode(choices)}{more}}}\n\n'.encode()


@dataclass(slots=True)
class Counts:
    """Tokens of all prompts and choices of one answer so far."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0

    def add(self, delta: Delta) -> None:
        """Counts a delta's tokens."""
        self.prompt += len(delta.prompt_ids)
        self.completion += len(delta.token_ids)
        if delta.usage is not None:
            self.cached += delta.usage.cached_tokens

    def usage(self) -> dict[str, Any]:
        """Returns OpenAI's usage object."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


def deltas_of(core: GenerationCore, requests: list[GenerationRequest], n: int) -> AsyncGenerator[Delta, None]:
    """Returns the deltas of all prompts of one HTTP request; those of prompt i have the choices i * n to i * n + n - 1."""
    if len(requests) == 1:
        return core.generate(requests[0], Deadline())
    room = asyncio.Semaphore(PROMPTS_AT_ONCE)
    return merge_streams([_numbered(core, request, i * n, room) for i, request in enumerate(requests)])


async def _numbered(
    core: GenerationCore, request: GenerationRequest, first: int, room: asyncio.Semaphore
) -> AsyncGenerator[Delta, None]:
    async with room, aclosing(core.generate(request, Deadline())) as deltas:
        async for delta in deltas:
            yield replace(delta, choice=first + delta.choice)


async def send_answer(
    exchange: Exchange,
    readers: Readers,
    deltas: AsyncGenerator[Delta, None],
    answer: Answer,
    *,
    stream: bool,
) -> None:
    """Sends the answer made of `deltas`. Leaving it, whatever the reason, cancels the request at its router.

    Raises the errors of errors.py, unless the response has begun: then the stream ends with the error.
    """
    if stream:
        await _stream(exchange, readers, deltas, answer)
        return

    async def take(delta: Delta) -> None:
        answer.add(delta)

    await readers.send(deltas, take)
    await exchange.send_json(answer.whole())


async def _stream(
    exchange: Exchange,
    readers: Readers,
    deltas: AsyncGenerator[Delta, None],
    answer: Answer,
) -> None:
    queue = _Queued(exchange)

    async def write(delta: Delta) -> None:
        if queue.waits:
            await queue.end()
        if chunk := answer.chunk(delta):
            await exchange.send_events(chunk)

    try:
        await readers.send(deltas, write)
        await queue.end()
        await exchange.send_events(answer.end() + _DONE, last=True)
    except Unread:
        exchange.break_off()
    except Exception as error:
        await queue.end()
        if not exchange.started:
            raise
        problem = problem_of(visible(error, exchange.request_id), exchange.names)
        await exchange.send_events(event(problem.body()) + _DONE, last=True)
    finally:
        queue.cancel()


class _Queued:
    """Shows a client whose request waits that the server is alive: with the status after FIRST_S, then with comments."""

    def __init__(self, exchange: Exchange):
        self._exchange = exchange
        self._over = asyncio.Event()
        self._task = spawn("queued HTTP request", self._show())

    @property
    def waits(self) -> bool:
        return not self._over.is_set()

    async def end(self) -> None:
        """Returns once no comment is being sent and none will be."""
        self._over.set()
        await asyncio.wait([self._task])

    def cancel(self) -> None:
        self._task.cancel()

    async def _show(self) -> None:
        wait_s = FIRST_S
        while True:
            try:
                async with asyncio.timeout(wait_s):
                    await self._over.wait()
                return
            except TimeoutError:
                await self._exchange.send_events(_QUEUED)
                wait_s = QUEUED_S
