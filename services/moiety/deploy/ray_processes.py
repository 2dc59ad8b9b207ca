"""The processes of a Ray that this process has started. Its agents may outlive their raylet by a minute: they are killed."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack, suppress
from pathlib import Path

ALONE_S = 1.0  # in which a process may end by itself once Ray is shut down


def children(of: Collection[int]) -> set[int]:
    """Returns the pids of the children of the processes `of`; none where the system is not Linux."""
    found = set()
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            parent = file.read_text(errors="replace").rpartition(")")[2].split()[1]
            if int(parent) in of:
                found.add(int(file.parent.name))
    return found


def end_all(roots: Collection[int], shut_down: Callable[[], None]) -> None:
    """Calls `shut_down`, then kills those of the processes `roots` and of their descendants that do not end by themselves."""
    found, last = set(roots), set(roots)
    while last := children(last) - found:
        found |= last
    with ExitStack() as ends:
        handles = []
        for pid in found:
            with suppress(OSError, AttributeError):  # it has ended, or the system has no such handles
                handles.append(os.pidfd_open(pid))  # stays with this process, though its pid may be used again
                ends.callback(os.close, handles[-1])
        try:
            shut_down()
        finally:
            for handle in _left(handles):
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(handle, signal.SIGKILL)


def _left(handles: Collection[int]) -> set[int]:
    """Returns the handles of the processes that have not ended after ALONE_S."""
    left, until = set(handles), time.monotonic() + ALONE_S
    poll = select.poll()
    for handle in handles:
        poll.register(handle, select.POLLIN)  # readable once its process has ended
    while left and (rest_s := until - time.monotonic()) > 0:
        for handle, _ in poll.poll(rest_s * 1000):
            poll.unregister(handle)
            left.discard(handle)
    return left
