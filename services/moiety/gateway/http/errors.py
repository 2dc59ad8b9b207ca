"""Maps our errors to HTTP statuses and OpenAI's error bodies, under the names of fields that the client used."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from moiety import errors


class HttpError(errors.MoietyError):
    """A request that HTTP itself refuses, such as one for an unknown path."""

    def __init__(self, status: int, message: str, code: str | None = None, allowed: Sequence[str] = ()) -> None:
        """`allowed`: the methods of the path, where another one was used."""
        self.status, self.code, self.allowed = status, code, tuple(allowed)
        super().__init__(message)


class ClientGone(errors.Cancelled):
    """The client closed its connection. There is nobody to answer."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """How a class of errors is answered."""

    status: int
    type: str
    code: str | None = None


# The first class that fits wins: a derived class with a status of its own stands before its base.
_KINDS: tuple[tuple[type[errors.MoietyError], _Kind], ...] = (
    (errors.InvalidRequest, _Kind(400, "invalid_request_error")),
    (errors.NotFound, _Kind(404, "invalid_request_error", "model_not_found")),
    (errors.ResourceExhausted, _Kind(429, "rate_limit_error", "rate_limit_exceeded")),
    (errors.DeadlineExceeded, _Kind(504, "server_error", "deadline_exceeded")),
    (errors.Cancelled, _Kind(503, "server_error", "cancelled")),
    (errors.FailedPrecondition, _Kind(400, "invalid_request_error", "not_supported")),
    (errors.Unavailable, _Kind(503, "server_error", "unavailable")),
    (errors.MoietyError, _Kind(500, "server_error", "internal_error")),
)
_FIELD = re.compile(r"[A-Za-z_][\w.]*(\[[^\]]*\][\w.]*)*(?= = )")  # with which the message of an InvalidRequest begins
_TOO_LONG = re.compile(r"\d+ (tokens|characters)")  # the value of a prompt that does not fit into the context


@dataclass(frozen=True, slots=True)
class Problem:
    """An error as a client sees it."""

    status: int
    message: str
    type: str
    param: str | None = None
    code: str | None = None
    retry_after_s: float | None = None
    allowed: tuple[str, ...] = ()

    def body(self) -> dict[str, Any]:
        """Returns OpenAI's error object."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Returns the headers that tell the client when to try again, or by which method."""
        found: list[tuple[bytes, bytes]] = []
        if (wait_s := self.retry_after_s) is not None:
            # Whole seconds by the standard; OpenAI's clients read the milliseconds.
            found.append((b"retry-after", b"%d" % max(ceil(wait_s), 1)))
            found.append((b"retry-after-ms", b"%d" % max(ceil(wait_s * 1000), 1)))
        if self.allowed:
            found.append((b"allow", ", ".join(self.allowed).encode()))
        return found


def problem_of(error: errors.MoietyError, names: Mapping[str, str] | None = None) -> Problem:
    """Returns how a client sees `error`.

    `names`: the core's name of a field -> the client's, such as sampling.max_tokens -> max_completion_tokens. An unlisted
    field of the core loses its prefix "sampling.".
    """
    if isinstance(error, HttpError):
        return Problem(error.status, str(error), "invalid_request_error", code=error.code, allowed=error.allowed)
    kind = next(kind for base, kind in _KINDS if isinstance(error, base))
    message, param, code = str(error), None, kind.code
    # The message, as an error that a router sent has nothing else.
    if isinstance(error, errors.InvalidRequest) and (found := _FIELD.match(message)) is not None:
        param = client_name(found[0], names or {})
        value = message[found.end() + len(" = ") :]
        message, code = f"{param} = {value}", _context_code(found[0], value)
    retry_after_s = error.retry_after_s if isinstance(error, errors.ResourceExhausted) else None
    return Problem(kind.status, message, kind.type, param, code, retry_after_s)


def client_name(field: str, names: Mapping[str, str]) -> str:
    """Returns the client's name of a core's field."""
    name, bracket, place = field.partition("[")
    return names.get(name, name.removeprefix("sampling.")) + bracket + place


def _context_code(field: str, value: str) -> str | None:
    """Returns OpenAI's code for a prompt, or prompt and output together, beyond the context."""
    too_long = field in ("prompt", "prompt.text") and _TOO_LONG.match(value.strip("'"))
    beyond = field == "sampling.max_tokens" and "are in a context of" in value
    return "context_length_exceeded" if too_long or beyond else None
