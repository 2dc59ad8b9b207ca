"""The parser of server-sent events: the same events, wherever the network cuts their bytes."""

from __future__ import annotations

import pytest

from moiety.client.http.sse import MOST_BYTES, SseEvent, SseParser
from moiety.errors import InvalidRequest

STREAM = (
    "\ufeff: a comment\n\n"
    'data: {"a": 1}\n\n'
    "event: error\r\ndata: zwei ü\r\n\r\n"
    "data:one\rdata: two\rdata\r\r"
    "id: 7\nretry: 10\nunknown: x\ndata:  two spaces\n\n"
    "event: without data\n\n"
    "data: [DONE]\n\n"
    "data: cut off"
).encode()
EVENTS = [
    SseEvent('{"a": 1}'),
    SseEvent("zwei ü", "error"),
    SseEvent("one\ntwo\n"),
    SseEvent(" two spaces"),
    SseEvent("[DONE]"),
]


def parsed(*parts: bytes) -> list[SseEvent]:
    """Returns the events of a stream that arrives in `parts`."""
    parser = SseParser()
    return [event for part in parts for event in parser.feed(part)]


def test_a_stream_cut_in_three_anywhere() -> None:
    """Two cuts at any places, inside a character or a line end too, change no event; an event that is cut off is none."""
    size = len(STREAM)
    for first in range(size + 1):
        for second in range(first, size + 1):
            assert parsed(STREAM[:first], STREAM[first:second], STREAM[second:]) == EVENTS, (first, second)


def test_a_stream_byte_by_byte() -> None:
    """A stream that arrives in single bytes, with empty reads between them, has the same events."""
    assert parsed(*(part for byte in STREAM for part in (bytes([byte]), b""))) == EVENTS


def test_events_come_as_soon_as_they_end() -> None:
    """An event is returned with the line end that completes it, not with the next event; that CR may be half a line end."""
    parser = SseParser()
    assert parser.feed(b"data: 1\r\n\r") == [SseEvent("1")]
    assert parser.feed(b"\ndata: 2\n") == []
    assert parser.feed(b"\n") == [SseEvent("2")]


@pytest.mark.parametrize("part", [b"data: " + b"x" * (1 << 20), b"data: " + b"x" * (1 << 20) + b"\n"])
def test_an_endless_event_is_refused(part: bytes) -> None:
    """A line without an end, and an event without an end, are refused before they fill the memory."""
    with pytest.raises(InvalidRequest, match=f"at most {MOST_BYTES}"):
        parsed(*[part] * 20)
