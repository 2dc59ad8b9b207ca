"""The cluster's Redis: `cluster/shared_redis.py` starts, keeps, refuses and stops it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from cluster_files import CLUSTER

from moiety.registry.embedded_redis import EmbeddedRedis

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def port() -> int:
    """A free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def run(tmp_path: Path, port: int) -> Iterator[Run]:
    """Runs the script with a password, in an environment as environment.sh makes it; at the end stops what it started."""
    (tmp_path / ".moiety").mkdir()

    def run(command: str, password: str = "s3cret", **changed: str) -> subprocess.CompletedProcess[str]:
        own = {"HOME": str(tmp_path), "HEAD_ADDRESS": "127.0.0.1", "REDIS_PORT": str(port), "REDIS_PASSWORD": password}
        return subprocess.run(
            [sys.executable, CLUSTER / "shared_redis.py", command],
            env={**os.environ, **own, **changed},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    yield run
    run("stop")


def test_the_redis_is_started_kept_and_stopped(run: Run, port: int) -> None:
    """A second start keeps the server; it demands the password, which its command line does not show."""
    assert run("start").stdout == f"started Redis at 127.0.0.1:{port}\n"
    with redis.Redis(port=port, password="s3cret") as client:
        server = client.info("server")["process_id"]
        with pytest.raises(redis.AuthenticationError), redis.Redis(port=port) as stranger:
            stranger.ping()
        assert "s3cret" not in Path(f"/proc/{server}/cmdline").read_text()
        assert run("start").stdout == f"keeps the Redis that runs at 127.0.0.1:{port}\n"
        assert client.info("server")["process_id"] == server
    assert run("stop").stdout == f"stopped Redis at 127.0.0.1:{port}\n"
    assert run("stop").stdout == f"no Redis at 127.0.0.1:{port}\n"


def test_a_redis_of_an_earlier_cluster_is_noticed(run: Run, port: int) -> None:
    """A server with another password is refused at the start, with its port and what to do, and is not stopped."""
    run("start", "earlier")
    for command in ("start", "stop"):
        refused = run(command)
        assert refused.returncode == 1
        assert refused.stderr.startswith(f"REDIS_PORT = {port}: at 127.0.0.1 listens a Redis with another password.")
        assert "set another REDIS_PORT in cluster/environment.sh" in refused.stderr
    assert run("stop", "earlier").returncode == 0


def test_other_servers_on_the_port_are_noticed(run: Run, port: int) -> None:
    """A Redis without a password, such as a distribution starts, and a server that speaks something else are refused."""
    with EmbeddedRedis(port):
        assert "listens a Redis without a password" in run("start").stderr
    with socket.create_server(("127.0.0.1", port)):
        assert "does not answer as a Redis does" in run("start").stderr


def test_an_address_of_another_machine_is_refused(run: Run, port: int) -> None:
    """Where the server cannot start, its own last words are shown, not the password."""
    refused = run("start", HEAD_ADDRESS="192.0.2.10")
    assert refused.returncode == 1
    assert f"Redis did not start on port {port}: " in refused.stderr
    assert "192.0.2.10" in refused.stderr
    assert "s3cret" not in refused.stderr
