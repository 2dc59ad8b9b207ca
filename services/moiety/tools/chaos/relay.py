"""A TCP relay in front of one server: it can delay, hold back, cut and refuse connections, as a bad network does.

The kernel's own means (netem) need a module that many machines lack. This needs nothing and works on loopback: the server
listens on 127.0.0.1, and the relay listens on the same port of another loopback address, RELAYED.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import suppress
from functools import partial

RELAYED = "127.0.0.2"  # where relays listen, and what relayed services advertise
CHUNK_BYTES = 1 << 16
QUEUED_CHUNKS = 64  # per direction; then the relay stops reading, and TCP slows the sender down
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends RST

_Pair = tuple[asyncio.StreamWriter, asyncio.StreamWriter]
_Chunks = asyncio.Queue[tuple[float, bytes]]  # when each is due; an empty one is the end


class Relay:
    """Passes connections to `(host, port)` on to `port` of 127.0.0.1. Used on one event loop."""

    def __init__(self, port: int, host: str = RELAYED) -> None:
        """`port`: of the server; the relay listens on the same port of `host`, or on a free one after `start(0)`."""
        self.target, self.host, self.port = port, host, port
        self.delay_s = 0.0  # that each chunk is late, in each direction; the order is kept
        self.refuses = False  # whether new connections are reset at once
        self._pairs: set[_Pair] = set()
        self._flows = asyncio.Event()
        self._flows.set()
        self._server: asyncio.Server | None = None

    async def start(self, port: int | None = None) -> None:
        """Listens on `port`, by default that of the server; 0 is a free one."""
        self._server = await asyncio.start_server(
            self._accept, self.host, self.port if port is None else port, limit=CHUNK_BYTES
        )
        self.port = self._server.sockets[0].getsockname()[1]

    @property
    def connections(self) -> int:
        """Open connections."""
        return len(self._pairs)

    def stall(self, stalled: bool) -> None:
        """Holds back every byte in both directions while `stalled`: connections stay open and say nothing (half-open)."""
        if stalled:
            self._flows.clear()
        else:
            self._flows.set()

    def reset(self) -> None:
        """Cuts every connection with RST at both ends; what is under way is lost."""
        for pair in tuple(self._pairs):
            self._pairs.discard(pair)
            for writer in pair:
                _reset(writer)

    async def close(self) -> None:
        """Stops listening and cuts every connection."""
        if self._server is not None:
            self._server.close()
        self.stall(False)
        self.reset()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refuses:
            _reset(writer)
            return
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target, limit=CHUNK_BYTES)
        except OSError:
            _reset(writer)
            return
        pair = writer, far_writer
        self._pairs.add(pair)
        try:
            await self._carry(reader, writer, far_reader, far_writer)
        except asyncio.CancelledError:
            pass  # the loop ends; asyncio would log the cancelled callback as an error
        finally:
            self._pairs.discard(pair)

    async def _carry(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        far_reader: asyncio.StreamReader,
        far_writer: asyncio.StreamWriter,
    ) -> None:
        """Passes bytes on in both directions until both have ended. If one end is reset, the other end is reset, too."""
        there: _Chunks = asyncio.Queue(QUEUED_CHUNKS)
        back: _Chunks = asyncio.Queue(QUEUED_CHUNKS)
        end = writer.close, far_writer.close
        try:
            async with asyncio.TaskGroup() as ways:
                ways.create_task(self._read(reader, there))
                ways.create_task(self._write(there, far_writer))
                ways.create_task(self._read(far_reader, back))
                ways.create_task(self._write(back, writer))
        except* OSError:
            end = partial(_reset, writer), partial(_reset, far_writer)
        finally:
            for each in end:
                each()

    async def _read(self, reader: asyncio.StreamReader, chunks: _Chunks) -> None:
        """Queues what arrives, each chunk with a deadline of its own, so that a delay does not lower the rate."""
        now, chunk = asyncio.get_running_loop().time, b"first"
        while chunk:
            chunk = await reader.read(CHUNK_BYTES)
            await chunks.put((now() + self.delay_s, chunk))

    async def _write(self, chunks: _Chunks, writer: asyncio.StreamWriter) -> None:
        """Sends each chunk when it is due; an empty one ends this direction."""
        now, chunk = asyncio.get_running_loop().time, b"first"
        while chunk:
            due, chunk = await chunks.get()
            await asyncio.sleep(max(0.0, due - now()))
            await self._flows.wait()
            if chunk:
                writer.write(chunk)
                await writer.drain()
        writer.write_eof()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Ends a connection without a word of goodbye: the peer gets RST."""
    if (sock := writer.get_extra_info("socket")) is not None:
        with suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()
