"""A Ray head node for the tests, started as an operator would (`ray start --head`), on loopback, ended by its own pid."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moiety.registry.embedded_redis import EmbeddedRedis

READY_S = 60.0


@dataclass(frozen=True)
class RayHead:
    """A running head node, and what its environment says to `cluster/serve.yaml`."""

    dashboard: str  # http://host:port
    gateway: str  # host:port that MOIETY_GRPC_PORT asks for
    redis_url: str
    model: str
    address: str  # host:port for ray.init


@contextmanager
def started_head(model: str) -> Iterator[RayHead]:
    """Runs one, with a Redis of its own. Replicas inherit the environment it was started with."""
    folder = Path(tempfile.mkdtemp(prefix="moiety-ray-"))  # short: Unix socket paths end at 107 characters
    gcs, dashboard, gateway = (_free_port() for _ in range(3))
    with EmbeddedRedis() as redis:
        head = RayHead(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{gateway}", redis.url, model, f"127.0.0.1:{gcs}")
        environment = {
            **os.environ,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            "OMP_WAIT_POLICY": "passive",
            "MOIETY_MODEL": head.model,
            "MOIETY_REGISTRY": head.redis_url,
            "MOIETY_GRPC_PORT": str(gateway),
        }
        options = [f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--num-cpus=16"]
        options += [f"--temp-dir={folder}", f"--object-store-memory={80 << 20}", "--node-ip-address=127.0.0.1"]
        log = (folder / "head.log").open("wb")
        ray_command = Path(sys.executable).with_name("ray")
        process = subprocess.Popen(
            [ray_command, "start", "--head", "--block", *options],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _wait_for_dashboard(head.dashboard, process, folder / "head.log")
            yield head
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)
            log.close()
            shutil.rmtree(folder, ignore_errors=True)


def _wait_for_dashboard(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until Serve's REST API answers."""
    until = time.monotonic() + READY_S
    while True:
        try:
            with urllib.request.urlopen(f"{url}/api/serve/applications/", timeout=5):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            if process.poll() is not None or time.monotonic() > until:
                raise AssertionError(f"Ray did not start:\n{log.read_text()}") from None
            time.sleep(0.2)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
