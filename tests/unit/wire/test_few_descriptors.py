"""A replica that runs out of file descriptors accepts shared-memory connections again once it has some."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator

import pytest

from moiety.core.replica import WIRE_VERSION
from moiety.internal.v1.experts_pb2 import DescribeReplicaResponse
from moiety.testing import SYSTEM, owner_of
from moiety.wire.transports.mailbox import Mailbox
from moiety.wire.transports.shm_connection import SharedMemoryConnection

# A line on stdin, "few" or "many", sets the limit of descriptors; an empty one does not. Each is answered on stdout.
REPLICA = f"""
import asyncio, os, resource, sys, threading
from moiety.core.supervise import TASKS
from moiety.wire.transports.mailbox import Mailbox
from moiety.wire.transports.shm_listener import SharedMemoryListener

async def main():
    mailbox = Mailbox()
    threading.Thread(target=lambda: [mailbox.wait() for _ in iter(int, 1)], daemon=True).start()
    listener = SharedMemoryListener({str(SYSTEM)!r}, "float32", 64, mailbox, lambda *_: None)
    print(listener.name, flush=True)
    while line := (await asyncio.to_thread(sys.stdin.readline)):
        if wanted := line.strip():
            soft = 256
            if wanted == "few":
                os.close(soft := os.dup(0))  # the next descriptor that would be taken
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        print(TASKS.failures["shared-memory listener"], flush=True)

asyncio.run(main())
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="shared memory is for Linux")


@pytest.fixture
async def replica() -> AsyncIterator[asyncio.subprocess.Process]:
    """A process with a shared-memory listener."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", REPLICA, stdin=pipe, stdout=pipe)
    yield process
    process.kill()
    await process.wait()


async def test_a_lack_of_descriptors_does_not_end_the_listener(replica: asyncio.subprocess.Process) -> None:
    """Without a free descriptor no connection is accepted; a router that connects later, with some free, is served."""
    assert replica.stdin is not None
    assert replica.stdout is not None
    name = (await replica.stdout.readline()).decode().strip()
    description = DescribeReplicaResponse(
        wire_version=WIRE_VERSION, system=str(SYSTEM), dtype="float32", shared_memory=name
    )

    async def failures(which: str = "") -> int:
        """Sets the limit, if one is given; returns how often the listener has failed."""
        assert replica.stdin is not None
        assert replica.stdout is not None
        replica.stdin.write(f"{which}\n".encode())
        return int(await replica.stdout.readline())

    async def connect(timeout_s: float) -> None:
        mailbox = Mailbox()
        with owner_of(mailbox):
            connection = await SharedMemoryConnection.open(description, mailbox, timeout_s)
            await connection.close()
            await connection.closed.wait()

    assert await failures("few") == 0
    waiting = asyncio.create_task(connect(10.0))
    async with asyncio.timeout(10):
        while await failures() == 0:
            await asyncio.sleep(0.02)
    assert not waiting.done()
    await failures("many")
    await waiting
    await connect(10.0)
