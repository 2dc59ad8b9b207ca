"""A child process of a LocalCluster, seen from the parent: its entry, its signals, and the messages on its pipes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moiety.core.replica import Replica

STOP_S = 10.0


@dataclass(slots=True, eq=False)
class Child:
    """One service process."""

    replica: Replica
    process: asyncio.subprocess.Process
    follower: asyncio.Task[None] | None = None
    reconfigured: asyncio.Queue[str] = field(
        default_factory=asyncio.Queue
    )  # what a change of live settings brought: "" or why not

    @property
    def pid(self) -> int:
        return self.process.pid

    def signal(self, number: int) -> None:
        """Sends a signal, such as SIGKILL or SIGSTOP, to the process."""
        self.process.send_signal(number)

    async def ended(self) -> None:
        """Waits until the process has ended and the cluster has removed it."""
        await self.process.wait()
        if self.follower is not None:
            await self.follower


async def write(process: asyncio.subprocess.Process, message: Mapping[str, Any]) -> None:
    """Sends a message to the child."""
    assert process.stdin is not None
    process.stdin.write(json.dumps(message).encode() + b"\n")
    await process.stdin.drain()


async def read(process: asyncio.subprocess.Process) -> dict[str, Any]:
    """Returns the child's next message. Raises EOFError if the child has ended."""
    assert process.stdout is not None
    if not (line := await process.stdout.readline()):
        raise EOFError
    message: dict[str, Any] = json.loads(line)
    return message


async def ended(process: asyncio.subprocess.Process) -> None:
    """Waits until the child has ended; kills it after STOP_S."""
    try:
        async with asyncio.timeout(STOP_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


def tail(log: Path, lines: int = 15) -> str:
    """Returns the last `lines` lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
