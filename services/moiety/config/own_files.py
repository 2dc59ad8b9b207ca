"""Folders that only this user may read, and a mark on a file or folder that lasts as long as the process that set it."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from moiety.errors import FailedPrecondition


def runtime_folder() -> Path:
    """Returns this user's folder for what is known of running processes: `moiety` in $XDG_RUNTIME_DIR, else `temporary_folder`.

    Raises FailedPrecondition as `temporary_folder` does.
    """
    given = os.environ.get("XDG_RUNTIME_DIR")
    # sudo may leave the variable of another user.
    if given and hasattr(os, "getuid") and Path(given).is_dir() and Path(given).stat().st_uid == os.getuid():
        return _private(Path(given) / "moiety")
    return temporary_folder()


def temporary_folder() -> Path:
    """Returns this user's folder below the temporary folder. Creates it, with mode 0700.

    Raises FailedPrecondition if it cannot be created, belongs to another user, or others may read it.
    """
    return _private(Path(tempfile.gettempdir()) / f"moiety-{os.getuid() if hasattr(os, 'getuid') else 'user'}")


def held(path: Path) -> int:
    """Marks a new file or folder as used by this process until it ends or closes the descriptor that is returned.

    The mark is a lock (flock) of the operating system, so it ends with the process, however that ends, and no other process
    with the same id can be taken for this one. Raises OSError where the file system has no locks.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if sys.platform != "win32":
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX)  # waits for a process that asks `is_held` at this moment
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def is_held(descriptor: int) -> bool:
    """Whether a process holds the open file. Where locks do not work, True: what may be in use is not removed."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return False


def _private(folder: Path) -> Path:
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise FailedPrecondition(
            f"folder {folder}: {error.strerror}: set XDG_RUNTIME_DIR or TMPDIR to another"
        ) from None
    if not folder.is_dir() or folder.is_symlink():
        raise FailedPrecondition(
            f"{folder} is no folder: remove it, or set XDG_RUNTIME_DIR or TMPDIR to another folder"
        )
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o077):
        raise FailedPrecondition(
            f"folder {folder}: must belong to this user and have mode 0700, so that nobody else can change what it says: "
            "remove it, or set XDG_RUNTIME_DIR or TMPDIR to another folder"
        )
    return folder
