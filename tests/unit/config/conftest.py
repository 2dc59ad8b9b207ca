"""Keeps the user's settings out of the tests."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def _no_environment_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes MOIETY_* variables that the user may have set."""
    for name in list(os.environ):
        if name.startswith("MOIETY_"):
            monkeypatch.delenv(name)
