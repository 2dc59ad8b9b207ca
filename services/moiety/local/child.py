"""One service as a child process of a LocalCluster: `python -m moiety.local.child`, which only `cluster.py` starts.

One JSON line on stdin says what to be; one on stdout says that it is ready, or why it cannot be, and more tell when its
registry entry changes. A second line on stdin asks for a drain; the end of stdin means that the parent is gone.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from moiety import compose
from moiety.core.replica import Replica, Role
from moiety.errors import MoietyError
from moiety.registry.entries import replica_to_json

LINE_BYTES = 1 << 20
POLL_S = 0.1


async def main() -> int:
    """Runs the service to its end; returns the exit status."""
    lifeline = asyncio.StreamReader(limit=LINE_BYTES)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lifeline), sys.stdin)
    order = json.loads(await lifeline.readline())
    try:
        settings = compose.settings_of(Role(order["role"]), order["settings"])
        running = await compose.start(settings, replica_id=order["replica_id"], node=os.uname().nodename)
    except MoietyError as error:
        _tell({"error": str(error)})
        return 1
    told = running.replica
    _tell_replica(told)
    command = asyncio.create_task(lifeline.readline())
    while not command.done():
        await asyncio.wait([command], timeout=POLL_S)
        if running.replica != told:
            told = running.replica
            _tell_replica(told)
    if line := command.result():
        draining = asyncio.create_task(running.drain(json.loads(line)["drain_s"]))
        await asyncio.sleep(0)  # it is DRAINING from here on, and the parent should hear so before the drain is over
        _tell_replica(running.replica)
        await draining
    await running.close()
    return 0


def _tell_replica(replica: Replica) -> None:
    _tell({"replica": json.loads(replica_to_json(replica))})


def _tell(message: Mapping[str, Any]) -> None:
    with suppress(BrokenPipeError):
        print(json.dumps(message), flush=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    sys.exit(asyncio.run(main()))
