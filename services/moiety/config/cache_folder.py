"""The folder for derived files, and how they are written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_dir() -> Path | None:
    """Returns the folder for derived files: $MOIETY_CACHE or ~/.cache/moiety; None if there is no home folder."""
    if text := os.environ.get("MOIETY_CACHE"):
        return Path(text)
    try:
        return Path.home() / ".cache" / "moiety"
    except RuntimeError:
        return None


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
