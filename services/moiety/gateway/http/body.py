"""Reads the body of a request, bounded before it is parsed, and parses it as a JSON object."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pydantic_core import from_json
from starlette.types import Receive

from moiety.core.text import not_utf8
from moiety.errors import InvalidRequest, ResourceExhausted
from moiety.gateway.http.errors import ClientGone, HttpError

MOST_BYTES = 16 << 20  # of one body
# Of all bodies that are being read or parsed. A parsed body may take some 30 times its size: `[[],[],…`.
MOST_BYTES_TOGETHER = 48 << 20
# Parsing holds up the event loop: by 0.2 s for this many lists, or for this many numbers in one list.
MOST_NESTED, MOST_VALUES = 1 << 18, 1 << 20
SMALL_BYTES = 64 << 10  # a body up to this size takes nothing of the budget that others share
RETRY_S = 1.0


class BodyReader:
    """Reads bodies for one gateway, within a budget for all of them. Used on its event loop only."""

    def __init__(self) -> None:
        self._bytes = 0  # of large bodies that are being read or parsed

    @contextmanager
    def _space(self) -> Iterator[_Space]:
        space = _Space(self)
        try:
            yield space
        finally:
            self._bytes -= space.taken

    def take(self, count: int) -> None:
        """Takes `count` bytes of the budget. Raises ResourceExhausted where others have taken it."""
        if self._bytes + count > MOST_BYTES_TOGETHER:
            why = f"bodies of {self._bytes} bytes are being read, at most {MOST_BYTES_TOGETHER} may be"
            raise ResourceExhausted(why, RETRY_S)
        self._bytes += count

    async def read(self, headers: Mapping[bytes, bytes], receive: Receive) -> dict[str, Any]:
        """Returns the JSON object that a request carries.

        Raises HttpError for another media type (415) or too large a body (413), InvalidRequest for what is no JSON object,
        ResourceExhausted if other bodies take the budget, ClientGone if the client leaves before it has sent everything.
        """
        _check_type(headers)
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and (len(declared) > 18 or int(declared) > MOST_BYTES):
            raise _too_large()
        with self._space() as space:
            data = bytearray()
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone("the client left before it had sent its request")
                data += message.get("body", b"")
                more = message.get("more_body", False)
                if len(data) > MOST_BYTES:
                    raise _too_large()
                space.grow(len(data))
            return _parsed(data)


class _Space:
    """What one body takes of the budget."""

    def __init__(self, reader: BodyReader):
        self._reader = reader
        self.taken = 0

    def grow(self, size: int) -> None:
        """Takes what a body of `size` bytes needs."""
        if size > max(self.taken, SMALL_BYTES):
            self._reader.take(size - self.taken)
            self.taken = size


def _parsed(data: bytearray) -> dict[str, Any]:
    # Counts those within texts, too: 2 MB of source code have some 100,000 brackets.
    if data.count(b"[") + data.count(b"{") > MOST_NESTED or data.count(b",") > MOST_VALUES:
        raise HttpError(
            413, f"the request's body has over {MOST_NESTED} brackets or {MOST_VALUES} commas, the most allowed"
        )
    try:
        # Refuses NaN, text that is not Unicode, numbers of thousands of digits, and nesting deeper than 200.
        value = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        if len(data) <= SMALL_BYTES and (found := _not_utf8(data)):  # the search takes too long for larger ones
            raise InvalidRequest(*found) from None
        raise InvalidRequest("body", f"{len(data)} bytes", f"JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequest("body", f"a JSON {type(value).__name__}", "a JSON object")
    return value


def _not_utf8(data: bytearray) -> tuple[str, str, str] | None:
    """Returns field, value and bound of the first text of a refused body that is half of a surrogate pair; None without one."""
    try:
        waiting = [("body", json.loads(data))]  # unlike `from_json`, it reads such text
    except (ValueError, RecursionError):
        return None
    while waiting:
        field, value = waiting.pop()
        if isinstance(value, str) and (why := not_utf8(value)) is not None:
            return field, value, f"Unicode text: {why}"
        if isinstance(value, dict):
            outer = "" if field == "body" else f"{field}."
            waiting += [(f"{outer}{name}", below) for name, below in reversed(value.items())]
            waiting += [(field, name) for name in value]
        elif isinstance(value, list):
            waiting += [(f"{field}[{place}]", below) for place, below in reversed(list(enumerate(value)))]
    return None


def _check_type(headers: Mapping[bytes, bytes]) -> None:
    # A page of a foreign site can make a browser send every other type without asking this server first.
    given = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if given != b"application/json":
        shown = given.decode("latin-1")[:80]
        raise HttpError(415, f"content-type = {shown!r}: must be application/json")
    encoding = headers.get(b"content-encoding", b"identity").strip().lower()
    if encoding != b"identity":
        shown = encoding.decode("latin-1")[:80]
        raise HttpError(415, f"content-encoding = {shown!r}: must be identity; compressed bodies are not read")


def _too_large() -> HttpError:
    return HttpError(413, f"the request's body has over {MOST_BYTES} bytes, the most allowed")
