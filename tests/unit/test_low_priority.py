"""Work at low priority answers its caller, and survives one that has gone."""

from __future__ import annotations

import asyncio
import threading

import pytest

from moiety.compose.background import at_low_priority
from moiety.core.supervise import TASKS


async def test_the_result_or_the_error_comes_back() -> None:
    """The caller gets what the function returns or raises."""
    assert await at_low_priority(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await at_low_priority(divmod, 7, 0)


@pytest.mark.parametrize("fails", [False, True])
async def test_a_cancelled_caller_does_not_break_the_thread(fails: bool) -> None:
    """The thread of a caller that was cancelled ends as always: its result, or its error, is dropped."""
    entered, go, threads = asyncio.Event(), threading.Event(), list[threading.Thread]()
    loop = asyncio.get_running_loop()
    TASKS.forget()

    def work() -> float:
        threads.append(threading.current_thread())
        loop.call_soon_threadsafe(entered.set)
        go.wait(10)
        return 1 / (0 if fails else 1)

    caller = asyncio.create_task(at_low_priority(work))
    async with asyncio.timeout(10):
        await entered.wait()
    caller.cancel()
    await asyncio.wait([caller])
    go.set()
    await asyncio.to_thread(threads[0].join, 10)
    assert caller.cancelled()
    assert not threads[0].is_alive()
    assert TASKS.failures["background"] == 0
