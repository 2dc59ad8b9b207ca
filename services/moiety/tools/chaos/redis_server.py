"""The Redis of a trial: a server of its own, which can be killed, stopped, emptied, filled and told to refuse writes."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping
from typing import Any

from moiety.errors import FailedPrecondition
from moiety.registry.embedded_redis import EmbeddedRedis


class RedisServer:
    """Starts a Redis server and speaks to it as an operator would. A context manager."""

    def __init__(self) -> None:
        self._server = EmbeddedRedis()

    def __enter__(self) -> RedisServer:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop()

    @property
    def port(self) -> int:
        return self._server.port

    @property
    def url(self) -> str:
        return self._server.url

    def signal(self, number: int) -> None:
        """Sends a signal to the server's process."""
        os.kill(self._server.pid, number)

    async def kill(self) -> None:
        """Kills the server with SIGKILL."""
        self.signal(signal.SIGKILL)
        await asyncio.to_thread(self._server.stop)

    async def begin(self) -> None:
        """Starts an empty server on the port of the one that was killed."""
        self._server = EmbeddedRedis(self.port)
        await asyncio.to_thread(self._server.start)

    async def command(self, *words: str) -> Any:
        """Sends one command and returns its reply: text, or a list. Raises FailedPrecondition where the server refuses it."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            encoded = [word.encode() for word in words]
            writer.write(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(w), w) for w in encoded))
            return await _reply(reader)
        finally:
            writer.close()

    async def configure(self, values: Mapping[str, str]) -> dict[str, str]:
        """Sets configuration values and returns the earlier ones. Raises FailedPrecondition where the server refuses one."""
        before: dict[str, str] = {}
        for name, value in values.items():
            before[name] = (await self.command("CONFIG", "GET", name))[1]
            await self.command("CONFIG", "SET", name, value)
        return before

    async def keys(self) -> int:
        """Returns the number of keys."""
        return int(await self.command("DBSIZE"))


async def _reply(reader: asyncio.StreamReader) -> Any:
    """Reads one reply of Redis's protocol, version 2."""
    line = (await reader.readuntil(b"\r\n"))[:-2].decode()
    kind, rest = line[:1], line[1:]
    if kind == "-":
        raise FailedPrecondition(f"Redis refused it: {rest}")
    if kind == "$":
        return (await reader.readexactly(int(rest) + 2))[:-2].decode(errors="replace") if rest != "-1" else ""
    if kind == "*":
        return [await _reply(reader) for _ in range(int(rest))]
    return rest
