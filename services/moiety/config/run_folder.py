"""The folder of one run, for sockets and logs: removed at its end, kept for a while if the run failed."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moiety.config.own_files import held, is_held, temporary_folder
from moiety.errors import FailedPrecondition

KEPT = 3  # folders of runs that failed or were killed; older ones are removed when the next run starts
KEPT_S = 7 * 24 * 3600.0
SCRATCH = "scratch"
NEW_S = 60.0  # a folder without a mark may be so new that its process has yet to set it


class RunFolder:
    """A new folder `moiety-<user>/<kind>-…` below the temporary folder. It is this process's until `end`."""

    def __init__(self, kind: str) -> None:
        """First removes what earlier runs left: scratch folders, others older than KEPT_S, and all but the newest KEPT."""
        try:
            parent = temporary_folder()
        except FailedPrecondition:  # another user has taken the name
            self.path = Path(tempfile.mkdtemp(prefix=f"moiety-{kind}-"))
        else:
            _remove_left(parent)
            self.path = Path(tempfile.mkdtemp(dir=parent, prefix=f"{kind}-"))
        self._descriptor: int | None = None
        with suppress(OSError):  # without locks, no folder is ever taken for one that was left
            self._descriptor = held(self.path)

    def end(self, *, keep: bool = False) -> None:
        """Removes the folder, or keeps it, so that the reason of a failure can be found. A second call does nothing."""
        if not keep:
            shutil.rmtree(self.path, ignore_errors=True)
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


@contextmanager
def run_folder(kind: str, say: Callable[[str], None]) -> Iterator[Path]:
    """Yields a RunFolder's path. Keeps the folder where an error leaves the context, and says so."""
    folder = RunFolder(kind)
    keep = False
    try:
        yield folder.path
    except Exception:
        keep = any(folder.path.iterdir())  # a run that failed before it started anything has no logs
        raise
    finally:
        folder.end(keep=keep)
        if keep:
            say(f"the logs of this run stay in {folder.path}: the {KEPT} newest are kept, for {KEPT_S / 86400:g} days")


def kept_folder(kind: str) -> Path | None:
    """Returns the newest folder that a run which failed or was killed has left; None if there is none."""
    with suppress(FailedPrecondition, OSError):
        left = [(path.stat().st_mtime, path) for path in temporary_folder().glob(f"{kind}-*")]
        return max(left)[1] if left else None
    return None


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yields a new folder, for files that nobody wants later. If this process is killed, the next run removes the folder."""
    folder = RunFolder(SCRATCH)
    try:
        yield folder.path
    finally:
        folder.end()


def _remove_left(parent: Path) -> None:
    """Removes folders in `parent` that no process holds, but for the newest that are no scratch folders."""
    left: list[tuple[float, Path]] = []
    for folder in parent.iterdir():
        with suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if not is_held(descriptor):
                    left.append((time.time() - os.fstat(descriptor).st_mtime, folder))
            finally:
                os.close(descriptor)
    kept = 0
    for age_s, folder in sorted(left):
        if folder.name.startswith(SCRATCH):
            keep = age_s < NEW_S
        else:
            kept += 1
            keep = kept <= KEPT and age_s <= KEPT_S
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
