"""The baseline of `moiety bench hop`: a child process that echoes bytes over unary gRPC, and the parent's side of the call.

The child stops when its stdin ends, so it ends with its parent even if the parent is killed.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import grpc

from moiety.errors import Unavailable
from moiety.wire.channels import channel
from moiety.wire.server import Server

SERVICE = "moiety.bench.Echo"
START_S = 30.0

Echo = Callable[[bytes], Awaitable[bytes]]


@asynccontextmanager
async def echo_process() -> AsyncIterator[Echo]:
    """Runs the child while the context is open. Yields an async function that sends bytes to it and returns the echo."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",
        "-m",
        "moiety.bench.echo",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,  # Ctrl-C at a terminal then reaches only the parent, which stops the child in order
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        async with asyncio.timeout(START_S):
            port = await process.stdout.readline()
        if not port:
            raise Unavailable("the echo process died while starting")
        async with channel(f"127.0.0.1:{int(port)}") as grpc_channel:
            yield grpc_channel.unary_unary(f"/{SERVICE}/Echo")  # no serialisers: raw bytes
    finally:
        process.stdin.close()
        await process.wait()


async def _child() -> None:
    async def echo(request: bytes, _context: grpc.aio.ServicerContext) -> bytes:
        return request

    handler = grpc.method_handlers_generic_handler(SERVICE, {"Echo": grpc.unary_unary_rpc_method_handler(echo)})
    server = Server([handler], [SERVICE])
    lifeline = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lifeline), sys.stdin)
    print(await server.start("127.0.0.1", 0), flush=True)
    await lifeline.read()
    await server.stop(0)


if __name__ == "__main__":
    asyncio.run(_child())
