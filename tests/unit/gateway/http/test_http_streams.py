"""Streams over HTTP while things go wrong: waiting, errors, clients that leave or do not read."""

from __future__ import annotations

import asyncio
import json
import socket

import pytest
from gateway_support import PROMPT, SHAPE, expected, tokens

from moiety.errors import Unavailable
from moiety.gateway.text.tokenizer import Tokenizer
from moiety.testing import FakeEngine, eventually, fake_shape
from support.doors import Door, door_over

PATH = "/v1/completions"
LONG = 20_000  # tokens: some 4 MB of events


async def test_a_waiting_stream_shows_that_it_lives(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    """The status comes before the first token, comments follow, and then the whole output."""
    monkeypatch.setattr("moiety.gateway.http.answers.answer.FIRST_S", 0.05)
    monkeypatch.setattr("moiety.gateway.http.answers.answer.QUEUED_S", 0.05)
    router, go = FakeEngine("a", SHAPE), asyncio.Event()

    async def wait(_: int) -> None:
        await go.wait()

    router.before_token = wait
    async with door_over(tokenizer, router) as door:
        body = {"prompt": PROMPT, "max_tokens": 3, "seed": 0, "stream": True}
        async with door.http.stream("POST", PATH, json=body) as answer:
            assert answer.status_code == 200
            text = ""
            async for piece in answer.aiter_text():
                text += piece
                if text.count(": queued\n\n") >= 2:
                    go.set()
    before, _, after = text.partition("data: ")
    assert before == ": queued\n\n" * (len(before) // len(": queued\n\n"))
    assert ": queued" not in after
    assert after.endswith("data: [DONE]\n\n")


async def test_an_error_before_the_first_token_is_a_status(tokenizer: Tokenizer):
    """A stream that fails at once has the error's status, no events."""
    async with door_over(tokenizer, FakeEngine("a", SHAPE)) as door:
        error = await door.refused(PATH, 400, prompt=PROMPT, stream=True, max_tokens=0)
    assert error["param"] == "max_tokens"


async def test_an_error_within_a_stream_is_its_last_event(tokenizer: Tokenizer):
    """What was generated stays; then come the error and the end."""
    router = FakeEngine("a", SHAPE)

    async def fail(position: int) -> None:
        if position == 2:
            raise Unavailable("the experts are gone")

    router.before_token = fail
    async with door_over(tokenizer, router) as door:
        events = await door.events(PATH, prompt=PROMPT, max_tokens=6, seed=0)
        whole = await door.refused(PATH, 503, prompt=PROMPT, max_tokens=6, seed=0)
    assert events[0]["choices"][0]["text"]
    assert "the experts are gone" in events[-1]["error"]["message"]
    assert "the experts are gone" in whole["message"]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_frees_its_place(tokenizer: Tokenizer, stream: bool):
    """Its request is cancelled at the router at the next step, whether it streams or waits."""
    router, at = FakeEngine("a", SHAPE), asyncio.Event()

    async def hold(position: int) -> None:
        if position == 2:
            at.set()
            await asyncio.Event().wait()

    router.before_token = hold
    async with door_over(tokenizer, router) as door:
        _, writer = await connection(door)
        writer.write(request({"prompt": PROMPT, "max_tokens": 9, "stream": stream}))
        await at.wait()
        writer.close()
        await eventually(lambda: router.cancelled == 1)
        await eventually(lambda: door.gateway.core.running == 0)
        router.before_token = lambda _: asyncio.sleep(0)
        assert await tokens(door.gateway) == expected(6)


async def test_a_client_that_does_not_read_is_cut(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    """After UNREAD_S its request ends, at the router too, and others are served meanwhile."""
    monkeypatch.setattr("moiety.gateway.unread.UNREAD_S", 0.3)
    router = FakeEngine("a", fake_shape(max_context=2 * LONG))
    async with door_over(tokenizer, router) as door:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, address(door))
            sock.sendall(request({"prompt": PROMPT, "max_tokens": LONG, "stream": True}))
            await eventually(lambda: door.gateway.core.running == 1)
            assert (await door.post(PATH, prompt=PROMPT, max_tokens=2))["usage"]["completion_tokens"] == 2
            await eventually(lambda: door.gateway.core.running == 0, within_s=20)


async def test_one_connection_serves_many_requests(tokenizer: Tokenizer):
    """Answers and streams leave a connection usable."""
    async with door_over(tokenizer, FakeEngine("a", SHAPE)) as door:
        reader, writer = await connection(door)
        for stream in (True, False, True):
            writer.write(request({"prompt": PROMPT, "max_tokens": 2, "stream": stream}))
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            if stream:
                await reader.readuntil(b"0\r\n\r\n")
            else:
                (length,) = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")]
                await reader.readexactly(int(length.split(b":")[1]))
        writer.close()


def address(door: Door) -> tuple[str, int]:
    """The host and port of a door."""
    host, _, port = door.url.removeprefix("http://").rpartition(":")
    return host, int(port)


async def connection(door: Door) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A bare connection."""
    return await asyncio.open_connection(*address(door))


def request(body: object) -> bytes:
    """The bytes of a request."""
    content = json.dumps(body).encode()
    head = (
        f"POST {PATH} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content
