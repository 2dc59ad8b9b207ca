"""The lines of a batch's input: read, checked, and known by a digest of their `custom_id`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from moiety.errors import InvalidRequest

MOST_LINE_BYTES = 64 << 20
_URL = re.compile(r"/v1(/[A-Za-z0-9_-]+)+")


@dataclass(frozen=True, slots=True)
class BatchLine:
    """One request of a batch."""

    number: int  # of its line, from 1
    custom_id: str
    url: str  # the path of an endpoint, such as /v1/completions
    body: dict[str, Any]

    @property
    def key(self) -> bytes:
        """Stands for the `custom_id` where millions of them are kept."""
        return key_of(self.custom_id)


def key_of(custom_id: str) -> bytes:
    """Returns 16 bytes for `custom_id`. Two ids of a billion have the same ones with a probability of 1e-21."""
    return blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def json_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Yields number and bytes of each line, line ends included. Raises InvalidRequest for one above MOST_LINE_BYTES."""
    try:
        with file.open("rb") as lines:
            number = 0
            while line := lines.readline(MOST_LINE_BYTES + 1):
                number += 1
                if len(line) > MOST_LINE_BYTES:
                    raise InvalidRequest(f"{file}: line {number}: bytes", len(line), f"at most {MOST_LINE_BYTES}")
                yield number, line
    except OSError as error:
        raise InvalidRequest("file", str(file), f"a readable file ({error.strerror})") from None


def read_lines(file: Path) -> Iterator[BatchLine]:
    """Yields the requests of `file` in their order. Raises InvalidRequest, which names line and field of a wrong one."""
    for number, text in json_lines(file):
        if text.strip():
            yield _line(file, number, text.removeprefix(b"\xef\xbb\xbf") if number == 1 else text)


def check_input(file: Path) -> set[bytes]:
    """Reads the whole file and returns the keys of its requests.

    Raises InvalidRequest for a wrong line, and for a `custom_id` that an earlier line has.
    """
    keys: set[bytes] = set()
    for line in read_lines(file):
        key = line.key
        if key in keys:
            first = next(other.number for other in read_lines(file) if other.custom_id == line.custom_id)
            raise InvalidRequest(
                f"{file}: line {line.number}: custom_id", line.custom_id, f"unique, but line {first} has it too"
            )
        keys.add(key)
    if not keys:
        raise InvalidRequest("INPUT", str(file), "a file with at least one request")
    return keys


def _line(file: Path, number: int, text: bytes) -> BatchLine:
    """Returns the request of one line."""

    def wrong(field: str, value: object, bound: str) -> InvalidRequest:
        return InvalidRequest(f"{file}: line {number}{field and ': '}{field}", value, bound)

    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        line = None
    if not isinstance(line, dict):
        raise wrong("", text.strip().decode("utf-8", "replace"), "a JSON object")
    custom_id, method, url, body = (line.get(name) for name in ("custom_id", "method", "url", "body"))
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= 512:
        raise wrong("custom_id", custom_id, "a text of 1 to 512 characters")
    if method != "POST":
        raise wrong("method", method, '"POST"')
    if not isinstance(url, str) or not _URL.fullmatch(url):
        raise wrong("url", url, "the path of an endpoint, such as /v1/chat/completions")
    if not isinstance(body, dict):
        raise wrong("body", body, "a JSON object")
    if body.get("stream"):
        raise wrong("body.stream", body["stream"], "false or left out: a batch has whole answers")
    return BatchLine(number, custom_id, url, body)
