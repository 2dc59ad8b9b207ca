"""The relay: bytes arrive whole and in order, late by its delay, held back while stalled, and cut with RST."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random

import pytest

from moiety.testing import eventually
from moiety.tools.chaos.relay import Relay


@asynccontextmanager
async def echo() -> AsyncIterator[Relay]:
    """Yields the relay of a server that sends every byte back."""

    serving: set[asyncio.StreamWriter] = set()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.add(writer)
        try:
            while chunk := await reader.read(4096):
                writer.write(chunk)
                await writer.drain()
        except OSError:
            pass
        writer.close()
        serving.discard(writer)

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    relay = Relay(server.sockets[0].getsockname()[1])
    await relay.start()
    try:
        yield relay
    finally:
        await relay.close()
        await eventually(lambda: not serving)
        server.close()


async def test_what_is_sent_arrives_whole():
    """A megabyte comes back through the relay as it was sent, and so does the end of the stream."""
    sent = Random(0).randbytes(1 << 20)
    async with echo() as relay:
        reader, writer = await asyncio.open_connection(relay.host, relay.port)
        writer.write(sent)
        writer.write_eof()
        assert await reader.read() == sent
        writer.close()
        await eventually(lambda: relay.connections == 0)


async def test_a_delay_is_paid_once_per_way_and_not_per_chunk():
    """100 chunks at 50 ms each way take 100 ms and not 10 s: a delay does not lower the rate."""
    async with echo() as relay:
        relay.delay_s = 0.05
        reader, writer = await asyncio.open_connection(relay.host, relay.port)
        began = time.monotonic()
        for _ in range(100):
            writer.write(b"x")
            await asyncio.sleep(0)
        await reader.readexactly(100)
        assert 0.1 <= time.monotonic() - began < 2.0
        writer.close()


async def test_a_stalled_connection_stays_open_and_says_nothing():
    """While stalled, nothing arrives and nothing breaks; afterwards all bytes arrive."""
    async with echo() as relay:
        reader, writer = await asyncio.open_connection(relay.host, relay.port)
        writer.write(b"before")
        assert await reader.readexactly(6) == b"before"
        relay.stall(True)
        writer.write(b"after")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await reader.readexactly(5)
        assert relay.connections == 1
        relay.stall(False)
        assert await reader.readexactly(5) == b"after"
        writer.close()


async def test_a_reset_breaks_connections_and_new_ones_work():
    """A reset breaks open connections with an error; a new connection works, unless connections are refused."""
    async with echo() as relay:
        reader, writer = await asyncio.open_connection(relay.host, relay.port)
        writer.write(b"before")
        await reader.readexactly(6)
        relay.reset()
        with pytest.raises(ConnectionResetError):
            await reader.readexactly(1)
        writer.close()
        reader, writer = await asyncio.open_connection(relay.host, relay.port)
        writer.write(b"again")
        assert await reader.readexactly(5) == b"again"
        writer.close()
        relay.refuses = True
        reader, writer = await asyncio.open_connection(relay.host, relay.port)
        with pytest.raises(ConnectionResetError):
            await reader.readexactly(1)
        writer.close()
