"""How many threads the C++ kernels may use: a number of their own, beside torch's.

A kernel takes no more of them than its work is worth. torch shares out any elementwise operation of 32,768 elements, and
waking a thread that waits passively costs it more (50 us measured) than the operation (9): whoever computes decode steps
leaves torch one thread, and the kernels all.
"""

from __future__ import annotations

import os
import threading

import torch

_of_thread = threading.local()


def use_threads(count: int) -> None:
    """The calls that come from this thread may use so many."""
    _of_thread.count = count


def most_threads() -> int:
    """For calls from this thread: what `use_threads` said, else torch's number."""
    return getattr(_of_thread, "count", 0) or torch.get_num_threads()


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
