"""Runs several forward passes of one model in turns on one thread: while one waits for its experts, another computes.

Lanes are greenlets, not threads. A lane switches to another only where it would wait, so nothing needs a lock, a switch
costs microseconds, and lanes do not compete for the interpreter or the cores.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from greenlet import GreenletExit, getcurrent, greenlet

T = TypeVar("T")


class _Lane(Generic[T]):
    """One task with its own stack."""

    def __init__(self, task: Callable[[], T]):
        self._task = task
        self.due = 0.0  # monotonic time by which it must run again, event or not
        self.result: T
        self.error: BaseException | None = None
        self.stack = greenlet(self._run)

    def _run(self) -> None:
        try:
            self.result = self._task()
        except GreenletExit:
            raise
        except BaseException as error:
            self.error = error


class Lanes:
    """Runs the lanes of a step in turns, one step after another. Only one thread may call its methods."""

    def __init__(self, wait: Callable[[float], object]):
        """`wait(seconds)` blocks the thread until an event was handled or the time is over, as `Mailbox.wait` does."""
        self._block = wait
        self._running: dict[greenlet, _Lane[object]] = {}

    def wait(self, seconds: float) -> None:
        """Lets the other lanes run until an event was handled or `seconds` are over. A lane calls this instead of blocking."""
        lane = self._running.get(getcurrent())
        if lane is None:
            self._block(seconds)  # not in a lane: no other lane to run
            return
        lane.due = time.monotonic() + seconds
        parent = lane.stack.parent
        assert parent is not None
        parent.switch()

    def run(self, tasks: Sequence[Callable[[], T]]) -> list[T]:
        """Runs `tasks` as lanes; returns their results in order. If one fails, ends the others and raises its error."""
        if len(tasks) == 1:
            return [tasks[0]()]
        lanes = [_Lane(task) for task in tasks]
        self._running = {lane.stack: lane for lane in lanes}  # type: ignore[misc]
        try:
            while waiting := [lane for lane in lanes if not lane.stack.dead]:
                for lane in waiting:
                    lane.stack.switch()
                    if lane.error is not None:
                        raise lane.error
                waiting = [lane for lane in waiting if not lane.stack.dead]
                if waiting:
                    self._block(max(0.0, min(lane.due for lane in waiting) - time.monotonic()))
        finally:
            for lane in lanes:
                if not lane.stack.dead:
                    lane.stack.throw(GreenletExit)
            self._running = {}
        return [lane.result for lane in lanes]
