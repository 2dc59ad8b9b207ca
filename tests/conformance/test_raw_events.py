"""Server-sent events, read by Python's own HTTP client."""

from __future__ import annotations

import asyncio
import http.client
import json

from moiety.testing import FakeEngine
from support.doors import ChatDoor


async def test_events_are_lines_of_json(chat_door: ChatDoor, router: FakeEngine):
    """Each event is one line of ASCII that begins with `data: `, followed by an empty line; the last is [DONE]."""

    def read(host: str) -> list[bytes]:
        link = http.client.HTTPConnection(host, timeout=20)
        try:
            body = json.dumps({"messages": [{"role": "user", "content": "é"}], "max_tokens": 40, "stream": True})
            link.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            answer = link.getresponse()
            assert answer.status == 200
            assert answer.headers.get_content_type() == "text/event-stream"
            return [*answer]
        finally:
            link.close()

    async with chat_door(router) as door:
        lines = await asyncio.to_thread(read, door.url.removeprefix("http://"))
    assert lines[1::2] == [b"\n"] * (len(lines) // 2)
    events = lines[::2]
    assert events.pop() == b"data: [DONE]\n"
    assert all(event.startswith(b"data: {") and event.isascii() for event in events)
    assert json.loads(events[0][6:])["choices"][0]["delta"]["role"] == "assistant"
