"""How many threads the C++ kernels may use: a number per calling thread, separate from torch's.

A kernel uses fewer threads where its work is small. torch splits elementwise operations of 32,768 elements or more
among its threads. Waking a sleeping thread can take longer (50 us measured) than the operation itself (9 us). So for decode
steps a router sets torch to one thread, but does not lower the number for the kernels.
"""

from __future__ import annotations

import os
import threading

import torch

_calling_thread = threading.local()


def set_thread_limit(count: int) -> None:
    """Lets kernel calls from the calling thread use up to `count` threads; 0 returns to torch's number."""
    _calling_thread.count = count


def thread_limit() -> int:
    """Returns how many threads a call from this thread may use: the number set by `set_thread_limit`, else torch's."""
    return getattr(_calling_thread, "count", 0) or torch.get_num_threads()


def usable_cores() -> int:
    """Returns the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
