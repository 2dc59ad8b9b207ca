"""One service as a child process of a LocalCluster: `python -m moiety.local.child`, which only `cluster.py` starts.

The parent writes one JSON line to the child's stdin: which service to run. The child writes a JSON line to stdout when it is
ready, or when it cannot start (with the reason), and another whenever its registry entry changes. Further lines on stdin
change live settings, which a line on stdout answers, or request a drain, as SIGTERM does. The end of stdin means that the
parent is gone, or wants the child to end at once; so does a second SIGTERM.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from moiety import compose
from moiety.core.replica import Replica, Role
from moiety.core.supervise import spawn
from moiety.errors import MoietyError
from moiety.registry.entries import replica_to_json

LINE_BYTES = 1 << 20
POLL_S = 0.1


async def main() -> int:
    """Runs the service until it has drained or the parent is gone; returns the process's exit status."""
    stdin = asyncio.StreamReader(limit=LINE_BYTES)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin)
    request = json.loads(await stdin.readline())
    try:
        settings = compose.settings_of(Role(request["role"]), request["settings"])
        running = await compose.start(settings, replica_id=request["replica_id"], node=os.uname().nodename)
    except MoietyError as error:
        _send({"error": str(error)})
        return 1
    draining: asyncio.Task[None] | None = None
    terminated = 0

    def terminate() -> None:
        nonlocal terminated
        terminated += 1

    loop.add_signal_handler(signal.SIGTERM, terminate)
    sent = running.replica
    _send_replica(sent)
    line: bytes | None = None
    while line != b"" and terminated < 2 and (draining is None or not draining.done()):
        line = None
        with suppress(TimeoutError):
            async with asyncio.timeout(POLL_S):
                line = await stdin.readline()
        command = json.loads(line) if line else {}
        if "reconfigure" in command:
            await _reconfigure(running, command["reconfigure"])
        if draining is None and ("drain_s" in command or terminated):
            grace_s, ending = command.get("drain_s", settings.drain_s), command.get("ending", False)
            draining = spawn("drain", running.drain(grace_s, ending=ending))
            await asyncio.sleep(0)  # the replica is DRAINING now: report that before the drain is over
        if running.replica != sent:
            sent = running.replica
            _send_replica(sent)
    await running.close()
    return 0


async def _reconfigure(running: compose.Running, values: Mapping[str, Any]) -> None:
    try:
        await running.reconfigure(values)
    except MoietyError as error:
        _send({"reconfigured": str(error)})
    else:
        _send({"reconfigured": ""})


def _send_replica(replica: Replica) -> None:
    _send({"replica": json.loads(replica_to_json(replica))})


def _send(message: Mapping[str, Any]) -> None:
    with suppress(BrokenPipeError):
        print(json.dumps(message), flush=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    sys.exit(asyncio.run(main()))
