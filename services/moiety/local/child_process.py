"""A child process of a LocalCluster, seen from the parent: its entry, signals and cores, and the messages on its pipes."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moiety.client import Client
from moiety.core.replica import Replica
from moiety.errors import Unavailable

STOP_S = 10.0
_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Child:
    """One service process."""

    replica: Replica
    process: asyncio.subprocess.Process
    log: Path
    leaving: bool = False  # the cluster ends it
    follower: asyncio.Task[None] | None = None
    # of each change of live settings: why the child refused it, or an empty text
    reconfigured: asyncio.Queue[str] = field(default_factory=asyncio.Queue)

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

    async def end(self) -> None:
        """Ends the process: closes its stdin, which it obeys also if it is stopped, and kills it after STOP_S."""
        self.leaving = True
        with suppress(ProcessLookupError):
            self.signal(signal.SIGCONT)
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            async with asyncio.timeout(STOP_S):
                await self.process.wait()
        except TimeoutError:
            _log.warning("%s did not end within %g s: it is killed", self.replica.id, STOP_S)
        finally:  # also if this is cancelled: nothing may be left
            if self.process.returncode is None:
                self.process.kill()
                await self.process.wait()

    def obituary(self) -> str:
        """Returns how the process ended and the end of its log."""
        status = self.process.returncode or 0
        how = f"was killed by signal {-status}" if status < 0 else f"ended by itself with status {status}"
        return f"{self.replica.id} {how}; the end of its log:\n{tail(self.log)}"


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


async def until_serves(address: str) -> None:
    """Waits until the gateway at `address` has a router that is ready."""
    async with Client(address) as client:
        while True:
            with suppress(Unavailable):
                await client.models()
                return
            await asyncio.sleep(0.1)


def tail(log: Path, lines: int = 15) -> str:
    """Returns the last `lines` lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def share_of_cores(deployment: str, groups: int) -> list[int]:
    """Returns the cores to pin replicas of `deployment` to; an empty list if there are too few, or if pinning is impossible."""
    if not hasattr(os, "sched_setaffinity"):
        return []
    usable, group = sorted(os.sched_getaffinity(0)), int(deployment.rpartition("-")[2])
    return usable[group * len(usable) // groups : (group + 1) * len(usable) // groups] if len(usable) >= groups else []
