"""Finds and loads the C++ library, where it is built from these sources and this CPU can run it."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch  # noqa: F401  # load torch's libgomp first, so that the library shares its threads

from moiety_kernels.cpu.build import built
from moiety_kernels.cpu.calls import CALLS

SWITCH = "MOIETY_CPU_KERNELS"  # "off": compute with torch
COMMAND = "python -m moiety_kernels.cpu"
BASE = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "fma"})  # extensions that every function may use
VNNI = frozenset({"avx512_vnni"})
BF16 = frozenset({"avx512_bf16"})

_log = logging.getLogger(__name__)


class Library:
    """The loaded library. ctypes releases the GIL during calls; threads come from torch's OpenMP pool.

    Raises RuntimeError if a struct of `calls.h` does not have the size of its mirror in `calls.py`.
    """

    def __init__(self, path: Path, cpu: frozenset[str]):
        self.path, self.cpu = path, cpu
        self.pairs = cpu >= BF16 and cpu_vendor() == "AuthenticAMD"  # whether vdpbf16ps is faster, see packing.h
        self._library = ctypes.CDLL(str(path))
        self._functions: dict[str, Callable[..., None] | None] = {}
        sizes = (ctypes.c_int64 * len(CALLS)).in_dll(self._library, "moiety_call_bytes")
        for call, size in zip(CALLS, sizes, strict=True):
            if (mirrored := ctypes.sizeof(call)) != size:
                raise RuntimeError(f"{call.__name__} of calls.py has {mirrored} bytes: must have {size}, as in calls.h")

    def function(
        self, name: str, call: type[ctypes.Structure], isa: frozenset[str] = frozenset()
    ) -> Callable[..., None] | None:
        """Returns the C++ function `name`; None if this CPU lacks an instruction set extension of `isa`, logged once.

        The function returned takes the fields of `call` as keyword arguments.
        """
        if name not in self._functions:
            if missing := isa - self.cpu:
                _log.warning(
                    "computing %s with torch, which is slower: this CPU lacks %s", name, ", ".join(sorted(missing))
                )
                self._functions[name] = None
            else:
                function = self._library[name]
                function.argtypes, function.restype = (ctypes.POINTER(call),), None
                self._functions[name] = functools.partial(_run, function, call, len(call._fields_))
        return self._functions[name]


def _run(function: Callable[..., None], call: type[ctypes.Structure], fields: int, /, **values: Any) -> None:
    """Calls `function` with a `call` of `values`. Raises TypeError unless all its `fields` are given: ctypes would take 0."""
    if len(values) != fields:
        raise TypeError(f"{call.__name__}: {len(values)} fields given: must be {fields}, all of calls.py")
    function(call(**values))


@functools.cache
def load() -> Library | None:
    """Returns the C++ library, loaded once per process; None if torch has to compute instead.

    Torch computes if the library is switched off, not built, or not suited to this CPU. The last two are logged once.
    """
    if os.environ.get(SWITCH) == "off":
        return None
    path, problem = find()
    if path is None:
        _log.warning("computing with torch, which is slower than the C++ kernels: %s", problem)
        return None
    return Library(path, cpu_flags())


def find() -> tuple[Path | None, str]:
    """Returns the path of the library to load and an empty string, or None and the reason."""
    if missing := BASE - cpu_flags():
        return None, f"the C++ kernels need {', '.join(sorted(missing))}, which this CPU lacks"
    if (path := built()) is None:
        return None, f"the C++ kernels are not built: run `{COMMAND}` once"
    return path, ""


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Returns the instruction set extensions of this CPU under their Linux names; an empty set on other systems."""
    return frozenset(_cpuinfo("flags").split())


@functools.cache
def cpu_vendor() -> str:
    """Returns the vendor of this CPU under its Linux name; an empty string on other systems."""
    return _cpuinfo("vendor_id")


def _cpuinfo(key: str) -> str:
    """Returns the first value of `key` in /proc/cpuinfo; an empty string if there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")
