"""Runs tasks and threads so that none fails unnoticed: each failure is logged, counted and seen by the health check.

A process runs one service, so there is one record for all its tasks: `TASKS`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from moiety.errors import Unavailable

BACKOFF_S = 0.1  # before the first restart; doubled with each further failure
LONGEST_BACKOFF_S = 5.0
STEADY_S = 10.0  # a task that has run this long has recovered: its earlier failures no longer count
MOST_FAILURES = 5  # in a row, until a task that is restarted counts as sick

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Supervised:
    """One running task or thread, or one that ended by a failure."""

    name: str
    failures: int = 0  # in a row
    error: BaseException | None = None  # the latest failure
    ended: bool = False

    @property
    def sick(self) -> bool:
        return self.ended or self.failures >= MOST_FAILURES


class Tasks:
    """The supervised tasks and threads of this process. May be used from any thread."""

    def __init__(self) -> None:
        self.failures: Counter[str] = Counter()  # since the process started, by name
        self._supervised: set[Supervised] = set()
        self._lock = threading.Lock()

    def check(self) -> None:
        """Raises Unavailable if a task has ended by a failure, or has failed MOST_FAILURES times in a row."""
        with self._lock:
            sick = [one for one in self._supervised if one.sick]
        if sick:
            what = "ended by" if sick[0].ended else f"failed {sick[0].failures} times in a row, last by"
            raise Unavailable(f"task {sick[0].name!r} {what} {_shown(sick[0].error)}")

    def forget(self) -> None:
        """Forgets failures, for tests that provoke them."""
        with self._lock:
            self.failures.clear()
            self._supervised = {one for one in self._supervised if not one.ended}

    def begin(self, name: str) -> Supervised:
        """Records that a task has started."""
        with self._lock:
            self._supervised.add(one := Supervised(name))
        return one

    def end(self, one: Supervised) -> None:
        """Records that a task has ended well, or was cancelled."""
        with self._lock:
            self._supervised.discard(one)

    def failed(self, one: Supervised, error: BaseException, ran_s: float, restart: bool) -> float:
        """Records and logs a failure. Returns the delay in seconds before the restart."""
        with self._lock:
            self.failures[one.name] += 1
            one.failures = 1 if ran_s >= STEADY_S else one.failures + 1
            repeated = type(one.error) is type(error) and one.failures > 1
            one.error, one.ended = error, not restart
        delay_s = min(BACKOFF_S * 2.0 ** (one.failures - 1), LONGEST_BACKOFF_S)
        if not repeated:
            then = f"it starts again in {delay_s:g} s" if restart else "it has ended"
            _log.error("task %r failed, %s", one.name, then, exc_info=error)
        return delay_s


TASKS = Tasks()


def supervise(name: str, run: Callable[[], Coroutine[Any, Any, None]], *, restart: bool = True) -> asyncio.Task[None]:
    """Runs `run()` as a task until it returns or the task is cancelled.

    If it raises and `restart` is set, it is called again after a delay. Otherwise the health check fails from then on, so
    that the service is replaced. `name` is the task's kind, such as "registry watch", the same for all tasks of a kind.
    """

    async def keep_running() -> None:
        one = TASKS.begin(name)
        try:
            while True:
                began = time.monotonic()
                try:
                    return await run()
                except Exception as error:
                    delay_s = TASKS.failed(one, error, time.monotonic() - began, restart)
                if not restart:
                    return
                await asyncio.sleep(delay_s)
        finally:
            if not one.ended:
                TASKS.end(one)

    return asyncio.create_task(keep_running(), name=name)


def spawn(name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Runs `work`, which ends by itself, such as serving one call, as a task. A failure is logged and counted."""

    async def run() -> None:
        began = time.monotonic()
        try:
            await work
        except Exception as error:
            TASKS.failed(Supervised(name), error, time.monotonic() - began, restart=False)

    return asyncio.create_task(run(), name=name)


def supervise_thread(name: str, run: Callable[[], None], *, restart: bool = False) -> threading.Thread:
    """Returns a daemon thread, not started yet, that runs `run()` as `supervise` runs a task."""

    def keep_running() -> None:
        one = TASKS.begin(name)
        while True:
            began = time.monotonic()
            try:
                run()
            except Exception as error:
                delay_s = TASKS.failed(one, error, time.monotonic() - began, restart)
                if restart:
                    time.sleep(delay_s)
                    continue
                return
            TASKS.end(one)
            return

    return threading.Thread(target=keep_running, name=name, daemon=True)


def _shown(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}"
