"""A parser of server-sent events, after the WHATWG HTML standard, section 9.2.6 (interpreting an event stream)."""

from __future__ import annotations

from dataclasses import dataclass

from moiety.errors import InvalidRequest

MOST_BYTES = 16 << 20  # of one line, and of one event's data: a server cannot fill this process's memory
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class SseEvent:
    """One event. The fields `id` and `retry` of the standard serve reconnection, which a POST cannot use, and are dropped."""

    data: str
    event: str = "message"


class SseParser:
    """Turns the bytes of one stream into events. The bytes may be cut anywhere, also inside a character or a line end."""

    def __init__(self) -> None:
        self._line = bytearray()  # the part of the current line that has arrived
        self._data: list[bytes] = []  # the data lines of the current event
        self._data_bytes = 0
        self._event = b""
        self._after_cr = False  # the last byte was CR: an LF that follows belongs to the same line end
        self._first = True  # no line has been read yet: it may begin with a byte order mark

    def feed(self, data: bytes) -> list[SseEvent]:
        """Returns the events that `data` completes. An event that the end of the stream cuts off is never returned.

        Raises InvalidRequest where a line or an event is longer than MOST_BYTES.
        """
        if self._after_cr and data.startswith(b"\n"):
            data = data[1:]
            self._after_cr = False
        if not data:
            return []
        self._after_cr = data.endswith(b"\r")
        *ended, rest = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        events = []
        for part in ended:
            self._extend(part)
            line, self._line = bytes(self._line), bytearray()
            if (event := self._read(line)) is not None:
                events.append(event)
        self._extend(rest)
        return events

    def _extend(self, part: bytes) -> None:
        self._line += part
        if len(self._line) > MOST_BYTES:
            raise InvalidRequest("server-sent event: bytes of a line", len(self._line), f"at most {MOST_BYTES}")

    def _read(self, line: bytes) -> SseEvent | None:
        """Reads one line without its end. Returns the event that an empty line ends, if it has data."""
        if self._first:
            line, self._first = line.removeprefix(_BOM), False
        if not line:
            event = self._event.decode("utf-8", "replace") or "message"
            data, self._data, self._event, self._data_bytes = self._data, [], b"", 0
            return SseEvent(b"\n".join(data).decode("utf-8", "replace"), event) if data else None
        name, _, value = line.partition(b":")  # a comment has an empty name
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
            self._data_bytes += len(value) + 1
            if self._data_bytes > MOST_BYTES:
                raise InvalidRequest("server-sent event: bytes of data", self._data_bytes, f"at most {MOST_BYTES}")
        elif name == b"event":
            self._event = value
        return None
