"""The committed pictures are what their scripts draw."""

from __future__ import annotations

import runpy
from pathlib import Path

PICTURES = Path(__file__).parents[2] / "docs" / "pictures"


def test_pictures_are_current() -> None:
    """Both themes of the architecture picture; `python docs/pictures/architecture.py` draws them again."""
    script = runpy.run_path(str(PICTURES / "architecture.py"))
    for theme in script["THEMES"]:
        assert (PICTURES / f"architecture-{theme.name}.svg").read_text("utf-8") == script["draw"](theme)
