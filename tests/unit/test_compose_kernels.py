"""The C++ kernels are built before the first services start, or it is said why not."""

from __future__ import annotations

from pathlib import Path

import pytest

from moiety.compose.cpu_kernels import build_kernels
from moiety_kernels.cpu.library import BASE, SWITCH, cpu_flags


@pytest.fixture(autouse=True)
def nothing_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine where no kernels are built, without a compiler."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MOIETY_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")


@pytest.mark.skipif(not cpu_flags() >= BASE, reason="needs a CPU that the C++ kernels suit")
def test_no_compiler() -> None:
    """Without a compiler one line says so, and what to install."""
    lines: list[str] = []
    build_kernels(lines.append)
    assert "compiling" in lines[0]
    assert "torch computes, which is slower: no C++ compiler" in lines[1]


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who switched the kernels off hears nothing of them."""
    monkeypatch.setenv(SWITCH, "off")
    lines: list[str] = []
    build_kernels(lines.append)
    assert not lines
