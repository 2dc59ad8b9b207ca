"""Building and finding the C++ kernels, and computing without them."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moiety_kernels import ExpertWeights, grouped_expert_mlp
from moiety_kernels.cpu.calls import CALLS
from moiety_kernels.cpu.library import BASE, COMMAND, SWITCH, Library, find, load


def run_module(cache: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m moiety_kernels.cpu` with its own cache and an empty home folder."""
    command = [sys.executable, *COMMAND.split()[1:], *arguments]
    env = {**os.environ, "MOIETY_CACHE": str(cache), "HOME": str(cache / "home"), **environment}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


def test_a_missing_library_is_logged_with_the_build_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    """Without a library torch computes, and one warning names the command that builds it."""
    monkeypatch.setenv("MOIETY_CACHE", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setattr("moiety_kernels.cpu.library.cpu_flags", lambda: BASE)
    load.cache_clear()
    try:
        for _ in range(2):
            grouped_expert_mlp(torch.ones(1, 4), (1,), [ExpertWeights(torch.ones(4, 4), torch.ones(4, 2))])
    finally:
        load.cache_clear()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert COMMAND in caplog.text


def test_a_machine_without_a_compiler_says_so(tmp_path: Path):
    """A missing compiler gives exit status 1 and a message; with --optional, for images and setup, status 0."""
    for arguments, status in (((), 1), (("--optional",), 0)):
        done = run_module(tmp_path, *arguments, CXX="no-such-compiler")
        assert done.returncode == status
        assert "no-such-compiler" in done.stderr or "x86-64" in done.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_check_says_what_would_be_used(tmp_path: Path):
    """--check builds nothing, and exits with 1 where torch would compute."""
    for environment in ({}, {SWITCH: "off"}):
        done = run_module(tmp_path, "--check", **environment)
        assert done.returncode == 1
        assert done.stdout.startswith("used: torch")
    assert not list(tmp_path.rglob("*.so"))


def test_structs_that_differ_from_the_library_are_refused(monkeypatch: pytest.MonkeyPatch):
    """A Python struct with a field more than the C++ struct raises RuntimeError when the library is loaded."""
    path, problem = find()
    if path is None:
        pytest.skip(problem)

    class NormCall(CALLS[-1]):
        _fields_ = (("more", ctypes.c_int64),)

    monkeypatch.setattr("moiety_kernels.cpu.library.CALLS", (*CALLS[:-1], NormCall))
    with pytest.raises(RuntimeError, match=r"NormCall of calls\.py has 72 bytes: must have 64"):
        Library(path, BASE)
