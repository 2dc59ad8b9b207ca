"""The systems that `moiety serve` runs on this machine, as it records them for the user's other commands.

Each has a file in `runtime_folder()`, which it keeps locked. A file that nobody holds is of a process that was killed: it is
ignored and removed. Needs nothing that a plain `pip install moiety` lacks.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from moiety import __version__
from moiety.config.own_files import held, is_held, runtime_folder
from moiety.core.system import SystemId
from moiety.errors import FailedPrecondition

SUFFIX = ".json"
MOST_TEXT = 1 << 20  # characters of a record; nobody waits for a file that is larger, which is none


@dataclass(frozen=True, slots=True)
class RunningSystem:
    """One `moiety serve` on this machine. The registry's URL may hold a password, so only this user may read the file."""

    pid: int
    machine: str  # where `pid` counts: host, and container
    app: str
    model: str  # the name under which it is served
    checkpoint: str = ""  # its folder
    since: float = 0.0  # Unix seconds
    version: str = ""
    ready: bool = False  # False while it starts
    grpc: tuple[str, ...] = ()  # host:port of each gateway
    http: tuple[str, ...] = ()  # host:port of each gateway's HTTP API
    registry: str = ""  # URL
    system: str = ""  # text form of its SystemId, once it is known
    ray_address: str = ""  # of an existing Ray; "" = it runs its own
    logs: str = ""  # folder of Ray's logs; "" = not on this machine, or not known

    def __str__(self) -> str:
        where = f"gRPC {', '.join(self.grpc)}" if self.ready else "starting"
        return f"{self.app} (model {self.model}, {where}, pid {self.pid})"


class Record:
    """The file of one running system, which this process keeps up to date."""

    def __init__(self, folder: Path, system: RunningSystem) -> None:
        """Raises OSError if the file cannot be written."""
        self._file = folder / f"{system.pid}-{os.urandom(4).hex()}{SUFFIX}"
        self._system, self._descriptor = system, -1
        self._write()

    def update(self, **changes: Any) -> None:
        """Changes fields of the record. A reader sees the file before or after the change, and always locked."""
        self._system = replace(self._system, **changes)
        with contextlib.suppress(OSError):  # a full disk must not end a system that serves
            self._write()

    def remove(self) -> None:
        """Removes the file."""
        with contextlib.suppress(OSError):
            self._file.unlink()
        with contextlib.suppress(OSError):
            os.close(self._descriptor)

    def _write(self) -> None:
        handle, name = tempfile.mkstemp(dir=self._file.parent)  # mode 0600
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                json.dump(asdict(self._system), stream, indent=1)
            descriptor = held(Path(name))
            os.replace(name, self._file)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):  # a signal may come just after the file got its final name
                os.unlink(name)
            raise
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = descriptor


@contextmanager
def recorded(app: str, model: str, say: Callable[[str], None], **known: Any) -> Iterator[Callable[..., None]]:
    """Records this process as a system that starts, until the end of the context; yields a function that changes fields.

    Enter it first, so that the record outlasts all that the system runs. `known`: further fields of RunningSystem. If no file
    can be written, tells `say` why.
    """
    system = RunningSystem(os.getpid(), _machine(), app, model, since=time.time(), version=__version__, **known)
    try:
        record = Record(runtime_folder(), system)
    except (OSError, FailedPrecondition) as error:
        say(f"`moiety status`, `logs` and `stop` will not find this system: {error}")
        yield lambda **_: None
        return
    try:
        yield record.update
    finally:
        record.remove()


def none_runs() -> str:
    """Says that `running_systems` found none, and why it could not look where the folder cannot be used."""
    try:
        runtime_folder()
    except (OSError, FailedPrecondition) as error:
        return f"no system that `moiety serve` started can be seen on this machine ({error})"
    return "no system that `moiety serve` started runs on this machine"


def running_systems() -> tuple[RunningSystem, ...]:
    """Returns the systems that run on this machine, oldest first. Removes files of processes that have ended."""
    if sys.platform == "win32":
        return ()
    try:
        files = sorted(runtime_folder().glob(f"*{SUFFIX}"))
    except (OSError, FailedPrecondition):
        return ()
    return tuple(sorted(filter(None, map(_read, files)), key=lambda one: (one.since, one.pid)))


def is_running(system: RunningSystem) -> bool:
    """Whether the process of `system` has not ended."""
    return any((one.pid, one.since) == (system.pid, system.since) for one in running_systems())


def chosen(systems: Sequence[RunningSystem], wanted: str | None) -> RunningSystem | None:
    """Returns the system whose application, or whose process id, is `wanted`; without `wanted`, the only one.

    None if `systems` is empty. Raises FailedPrecondition, with the names of all, where none or several fit.
    """
    if not systems:
        return None
    fitting = [one for one in systems if wanted in (None, one.app)] or [
        one for one in systems if wanted == str(one.pid)
    ]
    if len(fitting) == 1:
        return fitting[0]
    names = "; ".join(map(str, fitting or systems))
    if not fitting:
        raise FailedPrecondition(f"no system of application {wanted!r} runs on this machine; what runs: {names}")
    raise FailedPrecondition(
        f"{len(fitting)} systems run on this machine: {names}; choose one with --app and its application or pid"
    )


def _read(file: Path) -> RunningSystem | None:
    """Returns what `file` says; None if its process has ended (then the file is removed), or is on another machine."""
    while True:
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe would wait for a writer
        except OSError:
            return None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            return None
        with os.fdopen(descriptor, encoding="utf-8") as stream:
            try:
                live, values = is_held(descriptor), json.loads(stream.read(MOST_TEXT))
                names = {field.name for field in fields(RunningSystem)}
                values = {name: value for name, value in values.items() if name in names}
                system = RunningSystem(**{**values, "grpc": tuple(values["grpc"]), "http": tuple(values["http"])})
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
                return None
            if not _is_sound(system):
                return None
            if system.machine != _machine():
                return None
            if live:
                return system
            try:
                if os.stat(file).st_ino != os.fstat(descriptor).st_ino:
                    continue  # it was replaced after it was opened
                file.unlink()
            except OSError:
                pass
            return None


def _is_sound(system: RunningSystem) -> bool:
    """Whether each field has the type that is declared. `stop` signals the pid: 0 and -1 would name other processes, too."""
    texts = [field.name for field in fields(system) if field.type == "str"]
    if system.system:
        try:
            SystemId.parse(system.system)
        except ValueError:
            return False
    return (
        type(system.pid) is int
        and system.pid > 1
        and type(system.since) in (int, float)
        and type(system.ready) is bool
        and all(isinstance(getattr(system, name), str) for name in texts)
        and all(isinstance(address, str) for address in (*system.grpc, *system.http))
        and (bool(system.grpc) or not system.ready)
    )


def _machine() -> str:
    """Names the host and, on Linux, the namespace of process ids: a folder may be shared by containers."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{socket.gethostname()} {namespace}".strip()
