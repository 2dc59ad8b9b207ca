"""The folder for derived files."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path | None:
    """Returns the folder for derived files: $MOIETY_CACHE or ~/.cache/moiety; None if there is no home folder."""
    if text := os.environ.get("MOIETY_CACHE"):
        return Path(text)
    try:
        return Path.home() / ".cache" / "moiety"
    except RuntimeError:
        return None
