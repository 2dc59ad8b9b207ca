"""One request of a batch until it has a result: which failures are tried again, and when."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from moiety.client.http.answers import error_message
from moiety.client.http.server import LOST, NO_CONNECTION, HttpAnswer, OpenAiServer, RequestFailed
from moiety.errors import FailedPrecondition, Unavailable
from moiety.tools.batch.lines import BatchLine
from moiety.tools.batch.results import ID_PREFIX
from moiety.wire.deadline import Deadline

BUSY = (429, 502, 503)  # the server has no room, or is not there behind its proxy: the request is not at fault
BROKE = (408, 500, 504)  # it may be
NOT_ALLOWED = (401, 403)  # the same for every request
FIRST_WAIT_S, MOST_WAIT_S = 0.5, 30.0


@dataclass(frozen=True, slots=True)
class Patience:
    """How long one request is tried again."""

    seconds: float = 600.0  # while the server is busy or away
    retries: int = 2  # after it failed or broke the connection


@dataclass(frozen=True, slots=True)
class Result:
    """The result of one request, as a line of the output (`ok`) or of the errors."""

    ok: bool
    line: dict[str, Any]
    output_tokens: int = 0


async def answer_to(server: OpenAiServer, line: BatchLine, patience: Patience) -> Result:
    """Sends `line` until it has a result.

    A busy server is asked again after its Retry-After, or after a wait that doubles from FIRST_WAIT_S to MOST_WAIT_S, each
    times a random factor from 1 to 1.5. Raises FailedPrecondition if the server refuses the key, Unavailable if it is away
    for longer than `patience`: what holds for one request then holds for all.
    """
    tries = _Tries(patience)
    while True:
        try:
            answer = await server.post(line.url, line.body)
        except RequestFailed as error:
            away = error.kind == NO_CONNECTION
            wait_s = tries.wait_s(None, busy=away) if away or error.kind == LOST else None
            if away and wait_s is None:
                raise Unavailable(f"{error}; tried for {patience.seconds:g} s") from None
            if wait_s is None:
                return Result(False, _line(line, error={"code": error.kind.replace(" ", "_"), "message": str(error)}))
        else:
            if answer.status in NOT_ALLOWED:
                raise FailedPrecondition(f"{server.url}: HTTP {answer.status}: {error_message(answer.body)}")
            again = answer.status in BUSY + BROKE
            wait_s = tries.wait_s(answer.retry_after_s, busy=answer.status in BUSY) if again else None
            if wait_s is None:
                return _result(line, answer)
        await asyncio.sleep(wait_s)


class _Tries:
    """What has been tried for one request."""

    def __init__(self, patience: Patience) -> None:
        self._patience, self._backoff_s, self._broke = patience, FIRST_WAIT_S, 0
        self._busy_until: Deadline | None = None  # how long a server that is busy without a break is asked again

    def wait_s(self, asked_s: float | None, *, busy: bool) -> float | None:
        """Returns the seconds to wait before the next try; None where there is none. `asked_s`: the server's own wish."""
        wait_s = self._backoff_s if asked_s is None else asked_s
        if busy:
            self._busy_until = self._busy_until or Deadline.after(self._patience.seconds)
            if self._busy_until.left() <= wait_s:
                return None
        else:
            self._busy_until = None  # the server had let the request in
            self._broke += 1
            if self._broke > self._patience.retries:
                return None
        self._backoff_s = min(2 * self._backoff_s, MOST_WAIT_S)
        return wait_s * random.uniform(1.0, 1.5)


def _result(line: BatchLine, answer: HttpAnswer) -> Result:
    ok = 200 <= answer.status < 300
    try:
        body = json.loads(answer.body)
    except (ValueError, RecursionError):
        if ok:
            return Result(False, _line(line, error={"code": "broken_answer", "message": "the answer is not JSON"}))
        body = {"error": {"message": error_message(answer.body)}}
    response = {"status_code": answer.status, "request_id": answer.request_id, "body": body}
    usage = body.get("usage") if isinstance(body, dict) else None
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return Result(ok, _line(line, response=response), tokens if isinstance(tokens, int) else 0)


def _line(
    line: BatchLine, *, response: dict[str, Any] | None = None, error: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {"id": f"{ID_PREFIX}{uuid4().hex}", "custom_id": line.custom_id, "response": response, "error": error}
