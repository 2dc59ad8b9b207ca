"""Fixtures: run the command in this process or in its own; the address of a gateway."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from moiety.cli.main import run
from support.serving import Served


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


@pytest.fixture
def gateway(served: Served) -> str:
    """Returns the address of the session's running system, whose services are processes of their own."""
    return served.cluster.address
