"""Runs a command's coroutine so that it cleans up on Ctrl-C and SIGTERM, and prints its progress."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
import weakref
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from math import inf
from typing import Any, TypeVar

import click

Result = TypeVar("Result")
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # they ask a command to end
SAME_S = 0.5
LOST_S = 0.1  # after which an interruption that was lost is raised again


class Interrupted(KeyboardInterrupt):
    """A signal ended the command, after its clean-up.

    It is a KeyboardInterrupt, so that neither an event loop nor a library that goes on after an error takes it for one.
    """

    def __init__(self, number: int = signal.SIGINT) -> None:
        self.number = number
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


class Signals:
    """The signals that ask a command to end, in the order in which they came."""

    def __init__(self) -> None:
        self._first_at = self._last_at = inf

    def note(self) -> bool:
        """Notes a signal that has come now. Returns whether it is the first."""
        self._last_at = time.monotonic()
        first = self._first_at == inf
        if first:
            self._first_at = self._last_at
        return first

    def again(self) -> bool:
        """Whether a second one has come. Two at the same moment are one: a program that runs this one may pass Ctrl-C on."""
        return self._last_at > self._first_at + SAME_S


@contextmanager
def signals_interrupt() -> Iterator[Signals]:
    """Raises Interrupted inside the block on SIGINT, SIGTERM or SIGHUP. Later signals are only noted, until the block ends.

    An interruption that was lost is raised again, and the one that leaves the block names the signal. SIGHUP is left alone
    where it is ignored, as under `nohup`.
    """
    signals = Signals()
    raised: weakref.ref[Interrupted] | None = None
    number_raised = signal.SIGINT

    def lost(_: object) -> None:
        """Sees to it that an interruption which nothing has handled is raised again.

        Python drops what a signal's handler raises in a callback of its own, such as those of a fork or of `__del__`. Ray's
        native code may make another KeyboardInterrupt of it.
        """
        if inside:
            signal.setitimer(signal.ITIMER_REAL, LOST_S)

    def kept(error: Interrupted) -> Interrupted:  # a frame of the traceback that knew the error would keep it alive
        nonlocal raised, number_raised
        raised, number_raised = weakref.ref(error, lost), signal.Signals(error.number)
        return error

    def stop(number: int, _: object) -> None:
        if signals.note():
            raise kept(Interrupted(number))

    def again(_number: int, _: object) -> None:
        if raised is not None and raised() is None and not _handles_interruption():
            raise kept(Interrupted(number_raised))

    handled = [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN or number != signal.SIGHUP]
    before = {number: signal.signal(number, stop) for number in handled}
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, again)
    hook, sys.unraisablehook = sys.unraisablehook, _without_interruptions(sys.unraisablehook)
    inside = True
    try:
        yield signals
    except Interrupted:
        raise
    except KeyboardInterrupt:
        if raised is None:
            raise
        raise Interrupted(number_raised) from None
    finally:
        inside = False
        if raised is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def _handles_interruption() -> bool:
    """Whether the code that runs is a handler or clean-up of an interruption."""
    error = sys.exception()
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _without_interruptions(hook: Callable[[Any], object]) -> Callable[[Any], object]:
    """Returns a `sys.unraisablehook` that does not print interruptions: they are raised again."""
    return lambda dropped: None if isinstance(dropped.exc_value, Interrupted) else hook(dropped)


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
        try:
            click.echo(f"[{time.monotonic() - began:6.1f} s] {stage}", err=True)
        except OSError:  # the terminal is gone, as after SIGHUP: what is still to be done does not depend on it
            silent = os.open(os.devnull, os.O_WRONLY)
            for stream in (1, 2):  # also what is buffered, or Python would fail at its end
                os.dup2(silent, stream)

    return show
