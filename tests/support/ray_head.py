"""A Ray head node for the tests: starts it on loopback as an operator would (`ray start --head`), stops it by its pid."""

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
    """A running head node, and the values that `cluster/serve.yaml` reads from its environment."""

    dashboard: str  # http://host:port
    gateway: str  # host:port of the gateway's gRPC API; the port is MOIETY_GATEWAY__PORT
    http: str  # of its HTTP API; the port is MOIETY_GATEWAY__HTTP_PORT
    redis_url: str
    model: str
    address: str  # host:port for ray.init


@contextmanager
def started_head(model: str) -> Iterator[RayHead]:
    """Runs a head node with its own Redis. Replicas inherit the environment that it was started with."""
    folder = Path(tempfile.mkdtemp(prefix="moiety-ray-"))  # short: a Unix socket's path may have 107 characters
    gcs, dashboard, gateway, http = (_free_port() for _ in range(4))
    with EmbeddedRedis() as redis:
        head = RayHead(
            dashboard=f"http://127.0.0.1:{dashboard}",
            gateway=f"127.0.0.1:{gateway}",
            http=f"127.0.0.1:{http}",
            redis_url=redis.url,
            model=model,
            address=f"127.0.0.1:{gcs}",
        )
        environment = {
            **os.environ,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            "OMP_WAIT_POLICY": "passive",
            "MOIETY_MODEL": head.model,
            "MOIETY_REGISTRY": head.redis_url,
            "MOIETY_GATEWAY__PORT": str(gateway),
            "MOIETY_GATEWAY__HTTP_PORT": str(http),
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
    """Waits until Serve's REST API answers. Raises AssertionError when `process` ends first, or after READY_S."""
    deadline = time.monotonic() + READY_S
    while True:
        try:
            with urllib.request.urlopen(f"{url}/api/serve/applications/", timeout=5):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"Ray did not start:\n{log.read_text()}") from None
            time.sleep(0.2)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
