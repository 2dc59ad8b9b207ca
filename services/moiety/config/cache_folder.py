"""The folder for derived files; how they are read, written, and kept few."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

KEPT = 64  # derived files of one kind: those of that many models that were used last; the largest take a few MB each


def cache_dir() -> Path | None:
    """Returns the folder for derived files: $MOIETY_CACHE or ~/.cache/moiety; None if there is no home folder."""
    if text := os.environ.get("MOIETY_CACHE"):
        return Path(text)
    try:
        return Path.home() / ".cache" / "moiety"
    except RuntimeError:
        return None


def read_derived(file: Path) -> str:
    """Returns the text of a derived file, and marks it as used. Raises OSError if there is none."""
    text = file.read_text(encoding="utf-8")
    with suppress(OSError):  # another user's
        os.utime(file)
    return text


def prune_derived(files: Iterable[Path]) -> None:
    """Removes all but the KEPT last used of `files`, derived files of one kind, and folders that become empty by that."""
    used: list[tuple[float, Path]] = []
    for file in files:
        with suppress(OSError):
            used.append((file.stat().st_mtime, file))
    for _, file in sorted(used, reverse=True)[KEPT:]:
        with suppress(OSError):
            file.unlink()
            file.parent.rmdir()


def write_derived(file: Path, text: str) -> None:
    """Writes a derived file atomically: no reader sees a half-written one. Raises OSError if the folder is not writable."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=file.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise
