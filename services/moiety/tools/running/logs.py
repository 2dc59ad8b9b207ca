"""The log files that the replicas of a system have on this machine: where they are, and their lines as they grow.

Ray keeps them in one folder: what Serve logs of a replica in serve/replica_APP_DEPLOYMENT_REPLICA.log, and what the replica's
process prints, its warnings and tracebacks among it, in worker-…-PID.err and .out. Serve's controller has two as well.
"""

from __future__ import annotations

import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from moiety.config.application import EXPERTS, GATEWAY, HOT, ROUTER
from moiety.config.running_systems import RunningSystem
from moiety.core.system import SystemId
from moiety.errors import NotFound

POLL_S = 0.25
RAY_FOLDER = Path("/tmp/ray")  # on nodes whose environment is not known
CONTROLLER = "controller"
_DEPLOYMENT = rf"{GATEWAY}|{ROUTER}|{EXPERTS}\d+|{HOT}\d+"
_MARK = re.compile(r":(job_id|actor_name|task_name):")  # lines by which Ray marks whose output follows
_HEAD_BYTES = 4096  # of a worker's file: the marks stand at its start


@dataclass(frozen=True, slots=True)
class LogFile:
    """One file of one replica."""

    path: Path
    deployment: str
    source: str  # the replica's id, or "pid N"

    @property
    def prefix(self) -> str:
        """What the lines of this file begin with."""
        return f"{self.deployment} {self.source}"


def log_folder(system: RunningSystem) -> Path | None:
    """Returns the folder of this machine in which Ray logs for `system`, also before Ray has made it; None if not known.

    A Ray that ran before is taken to keep its logs where this user's environment would put them.
    """
    if system.logs:
        return Path(system.logs)
    from moiety.deploy.ray_cluster import default_ray_folder  # a second, which other systems need not

    folder = default_ray_folder() / SystemId.parse(system.system).cluster / "logs" if system.system else None
    return folder if folder is not None and folder.is_dir() else None


def log_files(folder: Path, app: str) -> list[LogFile]:
    """Returns the files of the replicas of `app` in `folder`, and of Serve's controller, sorted by deployment."""
    found = (*_of_serve(folder, app), *_of_processes(folder, app))
    return sorted(found, key=lambda file: (file.deployment, file.source, file.path.name))


def _of_serve(folder: Path, app: str) -> Iterator[LogFile]:
    replica = re.compile(rf"replica_{re.escape(app)}_({_DEPLOYMENT})_([^_]+)\.log")
    for path in folder.glob("serve/*.log"):
        if match := replica.fullmatch(path.name):
            yield LogFile(path, match[1], match[2])
        elif path.name.startswith(f"{CONTROLLER}_"):
            yield LogFile(path, CONTROLLER, f"pid {path.stem.rpartition('_')[2]}")


def _of_processes(folder: Path, app: str) -> Iterator[LogFile]:
    actor = re.compile(rf"^:actor_name:ServeReplica:{re.escape(app)}:({_DEPLOYMENT})$", re.MULTILINE)
    for path in (*folder.glob("worker-*.err"), *folder.glob("worker-*.out")):
        if match := actor.search(_head(path)):
            yield LogFile(path, match[1], f"pid {path.stem.rpartition('-')[2]}")


def chosen_files(files: list[LogFile], wanted: str | None) -> list[LogFile]:
    """Returns the files of the deployment `wanted`, or of all expert groups or hot sets for `experts` or `hot`; None = all.

    Raises NotFound, with the names that there are, if none fits.
    """
    fitting = [one for one in files if wanted in (None, one.deployment, one.deployment.rpartition("-")[0])]
    if files and not fitting:
        names = ", ".join(sorted({one.deployment for one in files}))
        raise NotFound(f"no log of a deployment {wanted!r}: there are {names}")
    return fitting


@dataclass(slots=True)
class LogReader:
    """Reads the lines that are added to log files, those of files that are new at each reading included."""

    folder: Path
    app: str
    wanted: str | None = None
    _open: dict[Path, BinaryIO] = field(default_factory=dict)
    _begun: dict[Path, bytes] = field(default_factory=dict)  # the start of a line that has no end yet

    def last(self, lines: int) -> Iterator[str]:
        """Yields the last `lines` lines of each file so far, and reads on from there. Raises NotFound as `chosen_files`."""
        for file in chosen_files(log_files(self.folder, self.app), self.wanted):
            yield from deque(self._added(file), maxlen=lines)

    def unfinished(self) -> Iterator[str]:
        """Yields the last line of each file that has one without an end, as a process leaves it that is killed."""
        for file in log_files(self.folder, self.app):
            if line := self._begun.get(file.path):
                yield f"{file.prefix}: {_text(line)}"

    def added(self) -> Iterator[str]:
        """Yields the lines that were added since the last reading. A deployment without a file yet has none."""
        for file in log_files(self.folder, self.app):
            if self.wanted in (None, file.deployment, file.deployment.rpartition("-")[0]):
                yield from self._added(file)

    def follow(self, running: Callable[[], bool], poll_s: float = POLL_S) -> Iterator[str]:
        """Yields lines as they are added, for as long as `running` says so, and what was added until then."""
        while True:
            goes_on = running()
            yield from self.added()
            if not goes_on:
                return
            time.sleep(poll_s)

    def close(self) -> None:
        """Closes the files."""
        for stream in self._open.values():
            stream.close()

    def _added(self, file: LogFile) -> Iterator[str]:
        goes_on = True
        while goes_on:
            try:
                stream = self._open.get(file.path) or self._open.setdefault(file.path, file.path.open("rb"))
            except OSError:  # it was removed in the meantime
                return
            for part in stream:
                line = self._begun.pop(file.path, b"") + part
                if not line.endswith(b"\n"):
                    self._begun[file.path] = line
                elif not _MARK.match(text := _text(line)):
                    yield f"{file.prefix}: {text}"
            if goes_on := _replaced(file.path, stream):
                self._open.pop(file.path).close()


def _text(line: bytes) -> str:
    return line.decode(errors="replace").rstrip("\r\n")


def _replaced(path: Path, stream: BinaryIO) -> bool:
    """Whether another file has the name by now: Ray renames a log that has become long, and begins a new one."""
    try:
        return path.stat().st_ino != os.fstat(stream.fileno()).st_ino
    except OSError:
        return False


def _head(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return stream.read(_HEAD_BYTES).decode(errors="replace")
    except OSError:
        return ""
