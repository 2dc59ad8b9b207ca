"""What happened to one request, put together from the events of its stream."""

from __future__ import annotations

import json
from array import array
from dataclasses import dataclass, field
from typing import Any

from moiety.bench.load.goodput import Measure
from moiety.client.http.answers import message_of
from moiety.client.http.server import BROKEN, RequestFailed, TimedEvent

ERROR_EVENT = "error event"
CUT_OFF = "stream ended early"


@dataclass(slots=True)
class Record:
    """One request. Times are seconds of the monotonic clock."""

    due: float  # when it should be sent
    sent: float = 0.0
    first: float | None = None  # when its first output arrived
    last: float | None = None  # when its last output arrived
    ended: float | None = None  # None while it runs, and for ever if the run was interrupted
    gaps: array[float] = field(default_factory=lambda: array("d"))  # between chunks with output
    chunks: int = 0  # with output
    prompt_tokens: int = 0
    output_tokens: int = 0  # as the server counts them; without a count, chunks
    counted: bool = False  # the server sent its count
    failure: str | None = None  # the kind of failure
    message: str = ""
    _finished: bool = False

    @property
    def ok(self) -> bool:
        """Whether the whole answer has arrived."""
        return self.ended is not None and self.failure is None

    def read(self, timed: TimedEvent) -> None:
        """Takes one event. Raises RequestFailed for an event that reports an error or is not of OpenAI's API."""
        data = timed.event.data
        if data.strip() == "[DONE]":
            self._finished = True
            return
        try:
            chunk = json.loads(data)
        except (ValueError, RecursionError):
            raise RequestFailed(BROKEN, f"event {data[:80]!r} is not JSON") from None
        if not isinstance(chunk, dict):
            raise RequestFailed(BROKEN, f"event {data[:80]!r} is no JSON object")
        if chunk.get("error") or timed.event.event == "error":
            raise RequestFailed(ERROR_EVENT, message_of(chunk))
        if isinstance(usage := chunk.get("usage"), dict):
            self.prompt_tokens = _count(usage.get("prompt_tokens"))
            self.output_tokens = _count(usage.get("completion_tokens"))
            self.counted = True
        try:
            choices = list(chunk.get("choices") or ())
            output, finished = any(map(_has_output, choices)), any(choice.get("finish_reason") for choice in choices)
        except (AttributeError, TypeError):
            raise RequestFailed(BROKEN, f"event {data[:80]!r} is not of OpenAI's API") from None
        if output:
            self._output(timed.at)
        self._finished = self._finished or finished

    def end(self, at: float) -> None:
        """Notes that the stream has ended. Raises RequestFailed if it ended before its output did."""
        if not self._finished:
            raise RequestFailed(CUT_OFF, "no finish_reason and no [DONE]")
        if not self.counted:
            self.output_tokens = self.chunks
        self.ended = at

    def fail(self, at: float, error: RequestFailed) -> None:
        """Notes that the request has failed."""
        self.ended, self.failure, self.message = at, error.kind, error.message

    def measures(self) -> dict[Measure, float | None]:
        """Returns the measures of a request that is ok, in ms. A measure that its output is too short for is None.

        `ttft` counts from sending to the first chunk with output, `itl` is the 99th percentile of this request's gaps between
        chunks, `tpot` the time from the first to the last chunk by the tokens after the first, `e2e` the whole request.
        """
        ordered = sorted(self.gaps)
        per_token = None
        if self.first is not None and self.last is not None and self.output_tokens > 1 and self.chunks > 1:
            per_token = 1000 * (self.last - self.first) / (self.output_tokens - 1)
        return {
            "ttft": None if self.first is None else 1000 * (self.first - self.sent),
            "itl": 1000 * ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)] if ordered else None,
            "tpot": per_token,
            "e2e": None if self.ended is None else 1000 * (self.ended - self.sent),
        }

    def _output(self, at: float) -> None:
        if self.last is None:
            self.first = at
        else:
            self.gaps.append(at - self.last)
        self.last = at
        self.chunks += 1


def _has_output(choice: Any) -> bool:
    """Whether a choice of a chunk has text, reasoning or a part of a tool call. A chat's first chunk has only a role."""
    if choice.get("text"):
        return True
    delta = choice.get("delta") or {}
    return any(delta.get(name) for name in ("content", "reasoning_content", "reasoning", "tool_calls"))


def _count(value: Any) -> int:
    return value if isinstance(value, int) else 0
