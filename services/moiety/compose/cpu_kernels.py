"""Builds the C++ kernels before the first services of a machine start."""

from __future__ import annotations

import os
from collections.abc import Callable

from moiety_kernels.cpu.build import BuildError, build, built


def build_kernels(progress: Callable[[str], None]) -> None:
    """Builds the C++ kernels for CPUs unless they are built, switched off, or this CPU lacks what they need.

    Tells `progress` before it compiles, and why nothing could be built: services then compute with torch, which is slower.
    """
    if built() is not None:
        return
    from moiety_kernels.cpu.library import BASE, SWITCH, cpu_flags  # torch: seconds that a built library saves

    if os.environ.get(SWITCH) == "off" or not cpu_flags() >= BASE:
        return
    progress("C++ kernels: compiling them, once on this machine, which takes up to a minute")
    try:
        build()
    except BuildError as error:
        reason = str(error).splitlines()[0]
        progress(f"C++ kernels: not built, so torch computes, which is slower: {reason}")
