"""Runs tasks and threads so that none fails unnoticed: each failure is logged, counted and seen by the health check.

A process runs one service, so there is one record for all its tasks: `TASKS`.
"""

from __future__ import annotations

import asyncio
import logging
import math
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
    began: float = 0.0  # time.monotonic() when it started, or started again
    ended: bool = False

    @property
    def sick(self) -> bool:
        return self.ended or (self.failures >= MOST_FAILURES and time.monotonic() - self.began < STEADY_S)


class Tasks:
    """The supervised tasks and threads of this process. May be used from any thread."""

    def __init__(self) -> None:
        self.failures: Counter[str] = Counter()  # since the process started, by name
        self._supervised: set[Supervised] = set()
        self.running: set[asyncio.Task[None]] = set()  # an event loop does not keep its tasks alive
        self._failed_at: dict[tuple[str, type[BaseException]], float] = {}  # (name, error) -> time.monotonic()
        self._lock = threading.Lock()

    def check(self) -> None:
        """Raises Unavailable if a task has ended by a failure, or has failed MOST_FAILURES times in a row.

        A task that has run for STEADY_S since then has recovered.
        """
        with self._lock:
            sick = [one for one in self._supervised if one.sick]
        if sick:
            what = "ended by" if sick[0].ended else f"failed {sick[0].failures} times in a row, last by"
            raise Unavailable(f"task {sick[0].name!r} {what} {_shown(sick[0].error)}")

    def total_failures(self) -> int:
        """Returns how often tasks and threads have failed since the process started."""
        with self._lock:
            return self.failures.total()

    def forget(self) -> None:
        """Forgets failures, for tests that provoke them."""
        with self._lock:
            self.failures.clear()
            self._failed_at.clear()
            self._supervised = {one for one in self._supervised if not one.ended}

    def begin(self, name: str) -> Supervised:
        """Adds a task or thread that begins to run."""
        with self._lock:
            self._supervised.add(one := Supervised(name))
        return one

    def end(self, one: Supervised) -> None:
        """Removes one that has returned or was cancelled."""
        with self._lock:
            self._supervised.discard(one)

    def failed(self, one: Supervised, error: BaseException, restart: bool) -> float:
        """Records a failure. Returns the delay in seconds before the restart.

        It is logged unless a task of the same name has failed with the same kind of error within the last STEADY_S.
        """
        now = time.monotonic()
        with self._lock:
            self.failures[one.name] += 1
            one.failures = 1 if now - one.began >= STEADY_S else one.failures + 1
            one.error, one.ended = error, not restart
            kind = one.name, type(error)
            repeated = now - self._failed_at.get(kind, -math.inf) < STEADY_S
            self._failed_at[kind] = now
        delay_s = min(BACKOFF_S * 2.0 ** (one.failures - 1), LONGEST_BACKOFF_S)
        if not repeated:
            then = f"it starts again in {delay_s:g} s" if restart else "it has ended"
            _log.error("task %r failed, %s", one.name, then, exc_info=error)
        return delay_s


TASKS = Tasks()


def supervise(name: str, run: Callable[[], Coroutine[Any, Any, None]], *, restart: bool = True) -> asyncio.Task[None]:
    """Runs `run()` as a task until it returns or the task is cancelled.

    If it raises and `restart` is set, it is called again after a delay. Otherwise the health check fails from then on, so
    that the service is replaced. The CancelledError of something that `run()` awaits is a failure, too. `name` is the
    task's kind, such as "registry watch", the same for all tasks of a kind.
    """

    async def keep_running() -> None:
        one = TASKS.begin(name)
        try:
            while True:
                one.began = time.monotonic()
                try:
                    return await run()
                except asyncio.CancelledError as error:
                    if _cancelled():
                        raise
                    delay_s = TASKS.failed(one, error, restart)  # what it waited for was cancelled, not this task
                except Exception as error:
                    delay_s = TASKS.failed(one, error, restart)
                if not restart:
                    return
                await asyncio.sleep(delay_s)
        finally:
            if not one.ended:
                TASKS.end(one)

    return _task(name, keep_running())


def spawn(name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Runs `work`, which ends by itself, such as serving one call, as a task. A failure is logged and counted."""

    async def run() -> None:
        try:
            await work
        except Exception as error:
            TASKS.failed(Supervised(name), error, restart=False)

    return _task(name, run(), work)


def supervise_thread(name: str, run: Callable[[], None], *, restart: bool = False) -> threading.Thread:
    """Returns a daemon thread, not started yet, that runs `run()` as `supervise` runs a task."""

    def keep_running() -> None:
        one = TASKS.begin(name)
        while True:
            one.began = time.monotonic()
            try:
                run()
            except Exception as error:
                delay_s = TASKS.failed(one, error, restart)
                if restart:
                    time.sleep(delay_s)
                    continue
                return
            TASKS.end(one)
            return

    return threading.Thread(target=keep_running, name=name, daemon=True)


def spawn_thread(name: str, work: Callable[[], object]) -> threading.Thread:
    """Returns a daemon thread, not started yet, that runs `work`, which ends by itself, as `spawn` runs a task."""

    def run() -> None:
        try:
            work()
        except Exception as error:
            TASKS.failed(Supervised(name), error, restart=False)

    return threading.Thread(target=run, name=name, daemon=True)


def _task(
    name: str, run: Coroutine[Any, Any, None], work: Coroutine[Any, Any, None] | None = None
) -> asyncio.Task[None]:
    """Starts `run`, which awaits `work`."""

    def done(task: asyncio.Task[None]) -> None:
        TASKS.running.discard(task)
        if work is not None:
            work.close()  # a task that is cancelled before it runs never awaits it

    task = asyncio.create_task(run, name=name)
    TASKS.running.add(task)
    task.add_done_callback(done)
    return task


def _cancelled() -> bool:
    """Whether the current task itself was cancelled."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


def _shown(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}"
