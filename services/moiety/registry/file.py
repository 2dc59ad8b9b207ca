"""A registry in one JSON file, for a `LocalCluster` on a machine without Redis.

The parent process is the only writer (`FileRegistryWriter`). It registers a child when the child reports that it is ready,
and removes it when the child exits, so entries need no TTL. The children read (`FileRegistry`).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from moiety.core.replica import Placement, Replica
from moiety.errors import FailedPrecondition, RegistryUnreachable
from moiety.registry import entries
from moiety.registry.memory import MemoryRegistry


class FileRegistry(MemoryRegistry):
    """Reads the registry file in a child process. Reads replicas and placement again whenever the file has changed.

    `register` and `deregister`, which a child's heartbeat calls, do nothing: only the parent writes the file.
    Counters, load reports, missing experts and decisions stay in the child's memory: without Redis nothing scales by load.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self._path = Path(path)
        self._seen: tuple[int, int, int] | None = None
        self._listed: dict[str, Replica] = {}
        self._reader = entries.TolerantReader()

    async def register(self, replica: Replica) -> None: ...

    async def deregister(self, replica_id: str) -> None: ...

    async def replicas(self) -> tuple[Replica, ...]:
        self._refresh()
        return tuple(self._listed[replica_id] for replica_id in sorted(self._listed))

    async def generation(self) -> str | None:
        """Returns a constant: unlike Redis, the file is not emptied while it is in use."""
        return "file"

    async def placement(self) -> Placement | None:
        self._refresh()
        return self._placement

    async def set_placement(self, placement: Placement) -> bool:
        """Raises FailedPrecondition: only the parent process (`FileRegistryWriter`) can set a placement."""
        raise FailedPrecondition(f"placement {placement.epoch}: only the process that owns {self._path} can set it")

    def _refresh(self) -> None:
        """Reads the file if it has changed. Blocks the event loop, because waking a thread would take longer than the read."""
        try:
            status = os.stat(self._path)
            # A replaced file has a new inode, even within one tick of a coarse clock and at an equal size.
            stamp = (status.st_ino, status.st_mtime_ns, status.st_size)
            if stamp == self._seen:
                return
            data = json.loads(self._path.read_bytes())
            replicas, placement = dict(data["replicas"]), data["placement"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RegistryUnreachable(f"registry file {self._path}: {error}") from error
        read = self._reader.read
        found = (read(f"replica:{key}", entries.replica_from_json, json.dumps(replicas[key])) for key in replicas)
        self._listed = {replica.id: replica for replica in found if replica is not None}
        self._placement = placement and read("placement", entries.placement_from_json, json.dumps(placement))
        self._seen = stamp


class FileRegistryWriter(FileRegistry):
    """Writes the registry file in the parent process: creates it, rewrites it whole at every change, removes it on `close`."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._write({})

    async def register(self, replica: Replica) -> None:
        if self._listed.get(replica.id) != replica:
            self._write({**self._listed, replica.id: replica})

    async def deregister(self, replica_id: str) -> None:
        if replica_id in self._listed:
            self._write({key: replica for key, replica in self._listed.items() if key != replica_id})

    async def set_placement(self, placement: Placement) -> bool:
        before = self._placement
        if stored := await MemoryRegistry.set_placement(self, placement):
            try:
                self._write(self._listed)
            except RegistryUnreachable:
                self._placement = before
                raise
        return stored

    async def close(self) -> None:
        self._path.unlink(missing_ok=True)

    def _refresh(self) -> None:
        """Does nothing: no other process writes the file, so this object knows its content."""

    def _write(self, listed: dict[str, Replica]) -> None:
        """Writes `listed` and the placement. If that fails, for instance because the disk is full, `listed` is not kept."""
        data = {
            "replicas": {key: json.loads(entries.replica_to_json(listed[key])) for key in sorted(listed)},
            "placement": self._placement and json.loads(entries.placement_to_json(self._placement)),
        }
        new = self._path.with_name(f"{self._path.name}.new")
        try:
            new.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
            os.replace(new, self._path)
        except OSError as error:
            raise RegistryUnreachable(f"registry file {self._path}: {error}") from error
        self._listed = listed
