"""Runs work that must not take time from requests being served."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import ParamSpec, TypeVar

from moiety.core.supervise import spawn_thread

NICENESS = 5  # about a third of the time of a serving thread on the same core; all of the time on an idle core

P = ParamSpec("P")
T = TypeVar("T")


async def at_low_priority(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Runs `function` in a new thread, at a lower priority where the system has priorities per thread.

    The thread is a new one because an unprivileged thread that has lowered its priority cannot raise it again.
    """
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()  # from now on it cannot be cancelled, so that its result can always be set

    def run() -> None:
        with suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)

    spawn_thread("background", run).start()
    return await asyncio.wrap_future(future)
