"""German: manuals."""

from __future__ import annotations

from moiety.training.sources.manuals import apache, electron_manual, fastapi

GERMAN = (fastapi("german"), apache("german"), electron_manual("german"))
