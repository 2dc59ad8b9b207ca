"""Finds and loads the built C++ library, if there is one for these sources and this CPU can run it."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch  # noqa: F401  # its libgomp must be loaded first, so that the library shares torch's threads

from moiety_kernels.cpu.build import built

SWITCH = "MOIETY_CPU_KERNELS"  # "off": compute with torch
COMMAND = "python -m moiety_kernels.cpu"
BASE = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "fma"})  # what every function may use
VNNI = frozenset({"avx512_vnni"})
BF16 = frozenset({"avx512_bf16"})

_log = logging.getLogger(__name__)


class Library:
    """The loaded library. ctypes releases the GIL during calls; threads come from torch's OpenMP pool."""

    def __init__(self, path: Path, cpu: frozenset[str]):
        self.path, self.cpu = path, cpu
        self.pairs = cpu >= BF16 and cpu_vendor() == "AuthenticAMD"  # whether vdpbf16ps pays, see packing.h
        self._library = ctypes.CDLL(str(path))
        self._functions: dict[str, Callable[..., None] | None] = {}

    def function(self, name: str, *arguments: Any, isa: frozenset[str] = frozenset()) -> Callable[..., None] | None:
        """`extern "C" void name(arguments)`, arguments as ctypes types; None where this CPU lacks an extension of `isa`."""
        if name not in self._functions:
            if missing := isa - self.cpu:
                _log.warning("%s is computed with torch, slowly: this CPU lacks %s", name, ", ".join(sorted(missing)))
                self._functions[name] = None
            else:
                function = self._library[name]
                function.argtypes, function.restype = arguments, None
                self._functions[name] = function
        return self._functions[name]


@functools.cache
def load() -> Library | None:
    """The library, or None (compute with torch then), which is told once, with what can be done about it."""
    if os.environ.get(SWITCH) == "off":
        return None
    path, problem = find()
    if path is None:
        _log.warning("computing with torch, more slowly than this CPU could: %s", problem)
        return None
    return Library(path, cpu_flags())


def find() -> tuple[Path | None, str]:
    """The library that would be loaded; or None, and why."""
    if missing := BASE - cpu_flags():
        return None, f"the C++ kernels need {', '.join(sorted(missing))}, which this CPU lacks"
    if (path := built()) is None:
        return None, f"the C++ kernels are not built: run `{COMMAND}` once"
    return path, ""


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The instruction set extensions of this CPU, as Linux names them; none elsewhere."""
    return frozenset(_told("flags").split())


@functools.cache
def cpu_vendor() -> str:
    """Who made this CPU, as Linux names them; empty elsewhere."""
    return _told("vendor_id")


def _told(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")
