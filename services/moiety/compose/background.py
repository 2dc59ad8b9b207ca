"""Work that must not steal time from requests that are being served."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import ParamSpec, TypeVar

NICENESS = 5  # about a third of the time of what serves, on a core that both want; all of it on an idle one

P = ParamSpec("P")
T = TypeVar("T")


async def at_low_priority(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Runs `function` in a thread of its own, below the others of this machine where the system can tell threads apart.

    A thread of its own, because an unprivileged one that has stepped back can't return.
    """
    future: Future[T] = Future()

    def run() -> None:
        with suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="background", daemon=True).start()
    return await asyncio.wrap_future(future)
