"""Runs a command's coroutine so that it cleans up on Ctrl-C and SIGTERM, and prints its progress."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import click

Result = TypeVar("Result")


class Interrupted(Exception):
    """A signal ended the command, after its clean-up."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        self.exit_status = 128 + number  # the shell's convention
        super().__init__(f"interrupted by {signal.Signals(number).name}")


def run_async(work: Coroutine[Any, Any, Result]) -> Result:
    """Returns the result of `work`. Raises Interrupted on SIGINT or SIGTERM, after `work` was cancelled and cleaned up.

    After a signal, run_async does not wait for worker threads. They cannot be cancelled and have nothing to clean up.
    """
    runner = asyncio.Runner()
    close = runner.close
    try:
        return runner.run(_until_signalled(work))
    except Interrupted:
        close = runner.get_loop().close  # unlike the runner's, it does not join threads
        raise
    finally:
        close()


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Raises Interrupted inside the block on SIGINT or SIGTERM. Later signals are ignored until the block ends."""

    def stop(number: int, _: object) -> None:
        for signal_number in handled:
            signal.signal(signal_number, signal.SIG_IGN)
        raise Interrupted(number)

    handled = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, stop) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def _until_signalled(work: Coroutine[Any, Any, Result]) -> Result:
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(work)
    received: list[int] = []

    def stop(number: int) -> None:
        received.append(number)
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    try:
        return await task
    except asyncio.CancelledError:
        if not received:
            raise
        leftovers = asyncio.all_tasks() - {asyncio.current_task()}
        for leftover in leftovers:
            leftover.cancel()
        await asyncio.gather(*leftovers, return_exceptions=True)
        raise Interrupted(received[0]) from None
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def progress() -> Callable[[str], None]:
    """Returns a function that prints the name of a stage on stderr, with the seconds since `progress` was called."""
    began = time.monotonic()

    def show(stage: str) -> None:
        click.echo(f"[{time.monotonic() - began:6.1f} s] {stage}", err=True)

    return show
