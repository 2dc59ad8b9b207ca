"""The fixture that chooses a test's kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from moiety_kernels.cpu.library import COMMAND, SWITCH, find, load


@pytest.fixture(params=["C++", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs a test twice: with the C++ kernels, if they can be used here, and with torch."""
    monkeypatch.setenv(SWITCH, "on" if request.param == "C++" else "off")
    if request.param == "C++" and find()[0] is None:
        pytest.skip(f"{find()[1]} ({COMMAND})")
    load.cache_clear()
    yield request.param
    load.cache_clear()
