"""Supervised tasks and threads: no failure passes unnoticed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator

import pytest

from moiety.core import supervise as supervision
from moiety.core.supervise import MOST_FAILURES, TASKS, spawn, supervise, supervise_thread
from moiety.errors import Unavailable


@pytest.fixture(autouse=True)
def no_earlier_failures(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test starts without failures, and restarts take no time."""
    monkeypatch.setattr(supervision, "BACKOFF_S", 0.001)
    TASKS.forget()
    yield
    TASKS.forget()


async def until(condition: Callable[[], bool]) -> None:
    """Waits until `condition()` holds."""
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


async def test_a_failed_task_is_started_again(caplog: pytest.LogCaptureFixture) -> None:
    """A task that fails is logged, counted and run again; one failure does not make the service sick."""
    runs = 0

    async def fails_once() -> None:
        nonlocal runs
        runs += 1
        if runs == 1:
            raise OSError("too many open files")
        await asyncio.Event().wait()

    task = supervise("listener", fails_once)
    await until(lambda: runs == 2)
    TASKS.check()
    assert TASKS.failures == {"listener": 1}
    assert "task 'listener' failed" in caplog.text
    assert "too many open files" in caplog.text
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


async def test_a_task_that_keeps_failing_is_logged_once_and_makes_the_service_sick(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Equal failures in a row are one log entry; after MOST_FAILURES the health check names the task, until it is cancelled."""

    async def fails() -> None:
        raise ValueError("broken")

    task = supervise("poll", fails)
    await until(lambda: TASKS.failures["poll"] >= MOST_FAILURES)
    with pytest.raises(Unavailable, match=r"'poll' failed \d+ times in a row, last by ValueError: broken"):
        TASKS.check()
    assert len([record for record in caplog.records if record.levelno >= logging.ERROR]) == 1
    task.cancel()
    await asyncio.wait([task])
    TASKS.check()


async def test_a_task_without_restart_ends_the_service() -> None:
    """The failure of a task that cannot be restarted stays visible to the health check."""

    async def fails() -> None:
        raise ValueError("broken")

    await supervise("engine", fails, restart=False)
    with pytest.raises(Unavailable, match="'engine' ended by ValueError: broken"):
        TASKS.check()


async def test_a_task_that_returns_is_well() -> None:
    """A task that returns is done: it is not run again, and the service stays healthy."""
    runs: list[int] = []

    async def returns() -> None:
        runs.append(1)

    await supervise("dial", returns)
    TASKS.check()
    assert runs == [1]


async def test_a_short_task_that_fails_is_logged_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    """The failure of one call's task is logged and counted, and the service stays healthy."""

    async def fails() -> None:
        raise ValueError("one call")

    await spawn("call", fails())
    TASKS.check()
    assert TASKS.failures == {"call": 1}
    assert "one call" in caplog.text


@pytest.mark.parametrize("restart", [True, False])
def test_a_failing_thread(restart: bool) -> None:
    """A thread is supervised like a task: run again if it may be, else the health check fails."""
    runs: list[int] = []

    def fails_once() -> None:
        runs.append(1)
        if len(runs) == 1:
            raise ValueError("broken")

    thread = supervise_thread("autoscaler", fails_once, restart=restart)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()
    assert TASKS.failures == {"autoscaler": 1}
    if restart:
        assert len(runs) == 2
        TASKS.check()
    else:
        with pytest.raises(Unavailable, match="'autoscaler' ended by"):
            TASKS.check()
