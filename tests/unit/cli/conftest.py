"""Fixtures: run the command in this process or in its own, and one running system for tests that need a gateway."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from moiety.cli.main import run
from moiety.local.cluster import LocalCluster


@dataclass(frozen=True, slots=True)
class Outcome:
    """Exit status and output of a command."""

    status: int
    out: str
    err: str


Command = Callable[..., Outcome]
Process = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def moiety(capsys: pytest.CaptureFixture[str]) -> Command:
    """Returns a function that runs `moiety` with the given words in this process."""

    def command(*words: str) -> Outcome:
        capsys.readouterr()
        status = run(words)
        return Outcome(status, *capsys.readouterr())

    return command


@pytest.fixture
def moiety_process() -> Iterator[Process]:
    """Yields a function that starts `moiety` with the given words as its own process. Kills the processes at the end."""
    started: list[subprocess.Popen[str]] = []

    def start(*words: str, **options: object) -> subprocess.Popen[str]:
        line = [sys.executable, "-m", "moiety.cli.main", *words]
        process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload]
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="package")
def gateway(tiny: Callable[[str], str]) -> Iterator[str]:
    """Yields the address of a running system that serves a tiny qwen3_moe, on an event loop in its own thread."""
    address: list[str] = []
    ready, done = threading.Event(), threading.Event()

    async def serve() -> None:
        async with LocalCluster(tiny("qwen3_moe"), groups=2, dtype="float32") as cluster:
            address.append(cluster.address)
            ready.set()
            await asyncio.to_thread(done.wait)

    def work() -> None:
        try:
            asyncio.run(serve())
        finally:
            ready.set()

    thread = threading.Thread(target=work)
    thread.start()
    assert ready.wait(60)
    assert address, "the system did not start"
    yield address[0]
    done.set()
    thread.join()
