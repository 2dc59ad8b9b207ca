"""What all tests share: tiny checkpoints made once a session, and a layout cache of the session's own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moiety.model.tiny import write_tiny


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Layouts derived by the tests, and by the processes they start, stay in this session's folder."""
    before = os.environ.get("MOIETY_CACHE")
    os.environ["MOIETY_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["MOIETY_CACHE"]
    else:
        os.environ["MOIETY_CACHE"] = before


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The folder of a tiny random checkpoint of an architecture, in its publisher's layout; made once."""
    made: dict[str, Path] = {}

    def folder(architecture: str) -> str:
        if architecture not in made:
            made[architecture] = write_tiny(architecture, tmp_path_factory.mktemp(architecture))
        return str(made[architecture])

    return folder
