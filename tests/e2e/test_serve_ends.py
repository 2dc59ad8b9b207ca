"""The end of `moiety serve` at a terminal, and new deployments on Ray, while streams run: the streams finish."""

from __future__ import annotations

import asyncio
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from moiety.client import Client
from moiety.core.replica import ReplicaState
from moiety.deploy.shutdown import end_application
from moiety.registry.connect import connect, live_systems
from support.ray_head import RayHead
from support.streams import Streams

MOIETY = Path(sys.executable).with_name("moiety")
APP = "redeployed"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


class Terminal:
    """`moiety serve` in a terminal of its own, which gets what it prints."""

    def __init__(self, model: str) -> None:
        arguments = ["serve", model, "--grpc-port", "0", "--http-port", "0", "--set", "experts.capacity=150"]
        self.shown = ""
        self.pid, self.screen = pty.fork()
        if self.pid == 0:
            os.execv(MOIETY, [str(MOIETY), *arguments])

    async def read_until(self, pattern: str) -> re.Match[str]:
        """Reads what the command prints until it matches `pattern`."""
        async with asyncio.timeout(120):
            while (found := re.search(pattern, self.shown)) is None:
                self.shown += (await asyncio.to_thread(os.read, self.screen, 1 << 16)).decode(errors="replace")
        return found

    async def status(self) -> int:
        """Waits for the end and returns the exit status."""
        async with asyncio.timeout(60):
            _, status = await asyncio.to_thread(os.waitpid, self.pid, 0)
        return os.waitstatus_to_exitcode(status)


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM", "closed"])
async def test_streams_finish_when_the_command_is_asked_to_end(tiny: Callable[[str], str], how: str) -> None:
    """After Ctrl-C at a terminal, SIGTERM, or the terminal's end, a stream gets all its tokens; no process is left.

    Over 20 s: it starts Ray and four replicas.
    """
    terminal = Terminal(tiny("mixtral"))
    try:
        address = (await terminal.read_until(r"GenerationService at (\S+)[\s\S]*stops it"))[1]
        processes = psutil.Process(terminal.pid).children(recursive=True)
        async with Client(address) as client:
            streams = Streams(client, 60, prompts=[[1, 2, 3]])
            await streams.wait_for_tokens(5)
            if how == "Ctrl-C":
                os.write(terminal.screen, b"\x03")
            elif how == "SIGTERM":
                os.kill(terminal.pid, signal.SIGTERM)
            else:
                os.close(terminal.screen)
            if how != "closed":
                await terminal.read_until(r"draining: 1 request, \d+ s left")
            assert [len(tokens) for tokens in await streams.finish()] == [60]
        assert await terminal.status() == (130 if how == "Ctrl-C" else 0)
        assert not psutil.wait_procs(processes, timeout=10)[1]
    finally:
        if psutil.pid_exists(terminal.pid):
            os.kill(terminal.pid, signal.SIGKILL)


def test_ctrl_c_during_the_start_leaves_nothing(tiny: Callable[[str], str]) -> None:
    """While Ray starts, and while replicas do, Ctrl-C ends the command with one line and without any process left."""
    for line_before in ("Redis:", "Ray: ready"):
        command = [MOIETY, "serve", tiny("mixtral"), "--grpc-port", "0", "--http-port", "0"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as served:
            assert served.stderr is not None
            for line in served.stderr:
                if line_before in line:
                    break
            time.sleep(1.5)  # some way into what follows
            processes = psutil.Process(served.pid).children(recursive=True)
            served.send_signal(signal.SIGINT)
            said = served.stderr.read()
            assert served.wait(60) == 130
        assert "Traceback" not in said
        assert said.rstrip().endswith("interrupted by SIGINT")
        assert not psutil.wait_procs(processes, timeout=10)[1]


@pytest.mark.ray
async def test_new_deployments_under_streams(ray_head: RayHead, tmp_path: Path) -> None:
    """`serve deploy` with other arguments replaces every replica, with wrong live settings none: no stream fails.

    Over 20 s: eight replicas start on two cores.
    """
    arguments: dict[str, Any] = {"app": APP, "dtype": "float32", "experts": {"capacity": 150.0}}
    application = {"name": APP, "route_prefix": None, "import_path": "moiety.deploy.app:build", "args": arguments}

    async def deploy() -> None:
        file = tmp_path / "serve.yaml"
        file.write_text(yaml.safe_dump({"proxy_location": "Disabled", "applications": [application]}))
        command = [Path(sys.executable).with_name("serve"), "deploy", "-a", ray_head.dashboard, file]
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr

    await deploy()
    try:
        before = await _ready(ray_head, lambda replicas: len(replicas) == 4)
        async with Client(ray_head.gateway) as client:
            streams = Streams(client, 120)
            await streams.wait_for_tokens(5)
            arguments["router"] = {"queue_limit": 99}
            await deploy()
            assert [len(tokens) for tokens in await streams.finish()] == [120] * 8
        after = await _ready(ray_head, lambda replicas: len(replicas) == 4 and replicas.keys().isdisjoint(before))
        application["deployments"] = [{"name": "experts-0", "user_config": {"capacity": -1}}]
        await deploy()
        later = await _ready(ray_head, lambda replicas: any("user_config.capacity" in why for why in replicas.values()))
        assert later.keys() == after.keys()
    finally:
        assert await asyncio.to_thread(end_application, APP, print, registry=ray_head.redis_url)


async def _ready(head: RayHead, enough: Callable[[dict[str, str]], bool]) -> dict[str, str]:
    """Waits until the replicas that are ready (id -> problem) are `enough`, and returns them."""
    async with asyncio.timeout(100):
        while True:
            ready: dict[str, str] = {}
            for system in await live_systems(head.redis_url, APP):
                registry = connect(head.redis_url, system)
                ready |= {one.id: one.problem for one in await registry.replicas() if one.state is ReplicaState.READY}
                await registry.close()
            if enough(ready):
                return ready
            await asyncio.sleep(0.2)
