"""A network partition: an expert replica in a network namespace of its own, whose only cable (veth) goes down.

Nothing of it leaves the machine. The addresses are of a block that is reserved for documentation, and are used only if this
machine has no route to them. Should the cable's own route vanish, a second route drops what is sent to them.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from random import Random

from moiety.errors import FailedPrecondition
from moiety.tools.chaos.fault import Kind, System
from moiety.tools.chaos.relay import Relay

NEAR, FAR, NET = "198.51.100.1", "198.51.100.2", "198.51.100.0/30"  # of a block for documentation, RFC 5737
PARTITION_S = 2.0  # longest gap, as for a hung process


@asynccontextmanager
async def _namespace() -> AsyncIterator[str]:
    """Makes a network namespace that has FAR, joined by a cable to this one, which has NEAR. Yields its name."""
    if shutil.which("ip") is None:
        raise FailedPrecondition("the command `ip` is not installed (Debian: apt install iproute2)")
    routes = await _ip(f"route show to match {FAR}")
    if [route for route in routes.splitlines() if not route.startswith("default")]:
        raise FailedPrecondition(f"this machine already has a network {NET}, which the trial would use: {routes}")
    name = f"moiety-{os.getpid()}"
    near, far = f"mn{os.getpid()}", f"mf{os.getpid()}"
    try:
        await _ip(f"netns add {name}")
        await _ip(f"route add blackhole {NET} metric 4096")
        await _ip(f"link add {near} type veth peer name {far} netns {name}")
        await _ip(f"addr add {NEAR}/30 dev {near}")
        await _ip(f"link set {near} up")
        await _ip(f"-n {name} link set lo up")
        await _ip(f"-n {name} addr add {FAR}/30 dev {far}")
        await _ip(f"-n {name} link set {far} up")
        yield name
    finally:
        for undo in (f"link del {near}", f"route del blackhole {NET} metric 4096", f"netns del {name}"):
            with suppress(FailedPrecondition):
                await _ip(undo)


async def _ip(command: str) -> str:
    """Runs `ip COMMAND` and returns its output. Raises FailedPrecondition where it fails, for example without root."""
    process = await asyncio.create_subprocess_exec(
        "ip", *command.split(), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, complaint = await process.communicate()
    if process.returncode:
        raise FailedPrecondition(f"`ip {command}` failed: {complaint.decode(errors='replace').strip()}")
    return output.decode(errors="replace").strip()


@asynccontextmanager
async def _partition(system: System, _: Random) -> AsyncIterator[str]:
    async with _namespace() as name:
        redis = Relay(system.redis.port, NEAR)
        await redis.start(0)
        try:
            replica = await system.add_expert(
                ("ip", "netns", "exec", name),
                listen_host=FAR,
                advertise_host=FAR,
                registry=f"redis://{NEAR}:{redis.port}/0",
            )
            try:
                await asyncio.sleep(1.0)  # until routers send it calls
                # The far end goes down: the near end keeps its address and its route, and what it sends is lost.
                await _ip(f"-n {name} link set mf{os.getpid()} down")
                yield f"the network of {replica.id} is cut off"
            finally:
                await system.remove(replica)
        finally:
            await redis.close()


KINDS = (
    Kind(
        "network-partition",
        "the cable (veth) of an expert replica in its own network namespace goes down",
        "its calls go to the other holders; keepalive closes its connections",
        PARTITION_S,
        _partition,
        on_ray=False,
    ),
)
