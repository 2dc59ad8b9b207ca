"""Runs marked blocks as a reader would who pastes them into a terminal, in a fresh folder, with a tiny model's checkpoint."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from markdown_blocks import ROOT, Block

from moiety.compose.environment import PROCESS_ENVIRONMENT

# Ports that the pages name. Each run has free ones instead, so that it does not meet other tests.
PORTS = ("50051", "50080", "6379", "6380", "6390", "8265")
# What stands for a tiny checkpoint in the fresh folder, and what is there as in a clone.
CHECKPOINTS = ("tiny-mixtral", "Mixtral-8x7B-v0.1", "checkpoint")
CLONE = ("cluster",)
FILES: Mapping[str, str] = {
    "conversation_trace.jsonl": '{"timestamp": 0, "input_length": 24, "output_length": 4}\n',
}
HUB_ID = "mistralai/Mixtral-8x7B-v0.1"  # `support.hub_server` serves it as a tiny checkpoint
# Text of a page → what a test runs.
TEXTS: Mapping[str, str] = {
    # The tests' environment is installed and active.
    "python3 -m venv .venv": ":",
    ". .venv/bin/activate": ":",
    "pip install --extra-index-url https://download.pytorch.org/whl/cpu '.[serve]'": ":",
    "/path/of/a/checkpoint": "$PWD/checkpoint",
    # Less work than a measurement does; and the other server is the same one.
    "--seconds 120 --input-tokens 128:1024 --output-tokens 128": "--seconds 1 --input-tokens 16:64 --output-tokens 8",
    "127.0.0.1:8000": "127.0.0.1:50080",
    # A system that `serve deploy` started has its port from this run, and the command cannot know it.
    "until moiety generate": "until moiety generate --address 127.0.0.1:50051",
    # Beside other Rays, and small.
    "ray start --head": "ray start --head --temp-dir=$PASTED_RAY --dashboard-port=8265 --object-store-memory=80000000",
}
READY_S, RUN_S, END_S = 300.0, 400.0, 90.0
ENDED_S = 2.0  # in which a shell ends once its last command has ended


@dataclass
class Pasted:
    """A fresh folder, and what runs in it. `environment` is added to the process's; `texts` are further substitutions."""

    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    ports: dict[str, str] = field(default_factory=lambda: {name: _free_port() for name in PORTS})
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    ray_folder: str = field(default_factory=lambda: tempfile.mkdtemp(prefix="moiety-"))  # short: it holds sockets

    def __post_init__(self) -> None:
        """Puts into the folder what a reader has there."""
        for name in CLONE:
            (self.folder / name).symlink_to(ROOT / name)
        for name, content in FILES.items():
            (self.folder / name).write_text(content, "utf-8")

    def text(self, block: Block) -> str:
        """Returns the block's script by the tables, with this run's ports."""
        script = block.script
        for old, new in {**TEXTS, **self.texts}.items():
            script = script.replace(old, new)
        return re.sub(r"\b\d{4,5}\b", lambda match: self.ports.get(match[0], match[0]), script)

    def run(self, block: Block) -> str:
        """Runs `block` to its end and returns what it printed. Raises AssertionError if it fails."""
        with self._started(block) as (process, output):
            _wait(lambda: process.poll() is not None, RUN_S, f"{block}: the end")
            assert process.poll() == 0, f"{block} ended with {process.returncode}:\n{output()}"
            return output()

    @contextmanager
    def running(self, block: Block) -> Iterator[None]:
        """Runs `block` and keeps its last command until the context ends, then presses Ctrl-C unless it has ended by then.

        Raises AssertionError if it ends before it prints what its marker names, if it ends by itself with an error, or if
        anything is left of it.
        """
        assert block.marker is not None
        with self._started(block) as (process, output):
            _wait(lambda: block.marker.until in output() or process.poll() is not None, READY_S, f"{block}: ready")
            assert process.poll() is None, f"{block} ended with {process.returncode}:\n{output()}"
            yield
            with suppress(subprocess.TimeoutExpired):  # one of the blocks may have ended it
                process.wait(ENDED_S)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
            _wait(lambda: process.poll() is not None, END_S, f"{block}: the end after Ctrl-C")
            status = process.returncode
            assert status in (0, 128 + signal.SIGINT), f"{block} ended with {status}:\n{output()}"
            _wait(lambda: not self.processes(), END_S, f"{block}: the end of all its processes")

    def processes(self) -> list[psutil.Process]:
        """Returns the running processes that it started, however: each or a parent has its mark, or listens on its ports."""
        ports = set(map(int, self.ports.values()))
        # Redis writes its title over its environment.
        open_ports = (each for each in psutil.net_connections("tcp") if each.status == psutil.CONN_LISTEN)
        listeners = {each.pid for each in open_ports if each.laddr.port in ports}
        found = {}
        for process in psutil.process_iter():
            try:
                if process.pid in listeners or process.environ().get("PASTED_RUN") == self.run_id:
                    found |= {each.pid: each for each in (process, *process.children(recursive=True))}
            except psutil.Error:
                continue
        return [process for process in found.values() if _alive(process)]

    def close(self) -> None:
        """Ends what is left of the blocks, such as a Ray that `ray start` put into the background."""
        left = self.processes()
        for kill in (False, True):
            for process in left:
                try:
                    (process.kill if kill else process.terminate)()
                except psutil.Error:
                    continue
            _, left = psutil.wait_procs(left, timeout=20)
        shutil.rmtree(self.ray_folder, ignore_errors=True)

    @contextmanager
    def _started(self, block: Block) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[], str]]]:
        """Starts `block` and yields its process and a function that returns its output so far."""
        script = self.folder / f"line-{block.line}"
        script.write_text(self.text(block), "utf-8")
        interpreter = [sys.executable] if block.language == "python" else ["bash", "-e"]
        log = script.with_suffix(".log")
        with log.open("wb") as sink:
            process = subprocess.Popen(
                [*interpreter, script],
                cwd=self.folder,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                yield process, lambda: log.read_text("utf-8", "replace")
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()

    def _environment(self) -> dict[str, str]:
        """Returns the environment of a reader whose home is the fresh folder, with this run's ports where none is typed."""
        scripts = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        # An earlier test may have run a command in this process that sets what services start with.
        before = {name: value for name, value in os.environ.items() if name not in PROCESS_ENVIRONMENT}
        return {
            **before,
            "PATH": scripts,
            "HOME": str(self.folder),
            "XDG_RUNTIME_DIR": str(self.folder),
            "PYTHONUNBUFFERED": "1",
            "MOIETY_GATEWAY__PORT": self.ports["50051"],
            "MOIETY_GATEWAY__HTTP_PORT": self.ports["50080"],
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_DASHBOARD_ADDRESS": f"http://127.0.0.1:{self.ports['8265']}",
            "PASTED_RAY": self.ray_folder,
            "PASTED_RUN": self.run_id,
            **self.environment,
        }


def _alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _wait(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s:.0f} s"
        time.sleep(0.1)


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
