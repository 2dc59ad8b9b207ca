"""Machines in trouble: a full disk, too few descriptors, a clock that jumps."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from random import Random

from moiety.core.replica import Role
from moiety.errors import FailedPrecondition
from moiety.tools.chaos.fault import DidNotHold, Kind, System, described, one_of

UNDISTURBED_S = 2.0
BLOCK = bytes(1 << 20)
SMALL_BYTES = 1 << 30  # a larger file system is not filled: it is not one made for the trial
CALLERS = 8  # connections to a process that has no descriptor left
ANSWER_S = 5.0
JUMPS_S = (3600, -3600, 86400)
FAKETIME = tuple(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))


@asynccontextmanager
async def _full_disk(system: System, _: Random) -> AsyncIterator[str]:
    space = os.statvfs(system.folder)
    if space.f_blocks * space.f_frsize > SMALL_BYTES:
        raise FailedPrecondition(f"{system.folder} is on no small file system of its own: mounting one needs root")
    filler = system.folder / "filler"
    try:
        with filler.open("wb", buffering=0) as file, suppress(OSError):
            while file.write(BLOCK):
                pass
        yield f"{system.folder} is full"
    finally:
        filler.unlink()


@asynccontextmanager
async def _few_descriptors(system: System, random: Random) -> AsyncIterator[str]:
    victim = one_of(system, Role.EXPERT, random)
    description = await described(victim)
    before = resource.prlimit(victim.pid, resource.RLIMIT_NOFILE)
    open_now = len(os.listdir(f"/proc/{victim.pid}/fd"))
    with ExitStack() as callers:
        resource.prlimit(victim.pid, resource.RLIMIT_NOFILE, (open_now, before[1]))
        try:
            for _ in range(CALLERS):
                caller = callers.enter_context(_connected(description.shared_memory))
                caller.send(b"not a hello")
            yield f"{victim.id} has no descriptor left, and {CALLERS} callers"
        finally:
            with suppress(ProcessLookupError):
                resource.prlimit(victim.pid, resource.RLIMIT_NOFILE, before)
    with _connected(description.shared_memory) as caller:
        caller.setblocking(False)
        caller.send(b"not a hello")
        try:
            async with asyncio.timeout(ANSWER_S):
                await asyncio.get_running_loop().sock_recv(caller, 4096)
        except TimeoutError:
            raise DidNotHold(f"{victim.id} takes no shared-memory connection since it had no descriptor left") from None


def _connected(name: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect(f"\0{name}")
    return sock


@asynccontextmanager
async def _jumping_clock(system: System, random: Random) -> AsyncIterator[str]:
    """Adds a replica whose clock jumps, and lets it jump while it serves."""
    if not FAKETIME:
        raise FailedPrecondition("faketime's library is not installed (Debian: apt install faketime)")
    offset = system.folder / "clock"
    offset.write_text("+0")
    variables = {
        "LD_PRELOAD": str(FAKETIME[0]),
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    replica = await system.add_expert(("env", *(f"{name}={value}" for name, value in variables.items())))
    try:
        jump = random.choice(JUMPS_S)
        offset.write_text(f"{jump:+d}")
        yield f"the clock of {replica.id} jumps by {jump:+d} s"
    finally:
        await system.remove(replica)


KINDS = (
    Kind(
        "machine-disk",
        "the disk of logs and caches is full",
        "serving goes on; what cannot be logged is lost",
        UNDISTURBED_S,
        _full_disk,
        on_ray=False,
    ),
    Kind(
        "machine-descriptors",
        "an expert replica has no descriptor left for new connections",
        "open connections go on; new ones are taken when there are descriptors again",
        UNDISTURBED_S,
        _few_descriptors,
        on_ray=False,
    ),
    Kind(
        "machine-clock",
        "the wall clock of an expert replica jumps by an hour or a day",
        "nothing notices: intervals are measured by the monotonic clock, entries expire by that of Redis",
        UNDISTURBED_S,
        _jumping_clock,
        lasts_s=6.0,
        on_ray=False,
    ),
)
