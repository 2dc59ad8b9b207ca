"""What one computing thread waits for, in one place: sockets of its own, and actions that other threads post to it.

The thread that computes also reads its sockets and handles what comes: no second thread stands between a doorbell and
the work it rings for. On this path a hand-over between threads costs more than everything else together.
"""

from __future__ import annotations

import logging
import os
import selectors
import socket
import threading
import weakref
from collections import deque
from collections.abc import Callable

_log = logging.getLogger(__name__)

READABLE, WRITABLE = selectors.EVENT_READ, selectors.EVENT_WRITE


class Mailbox:
    """Belongs to the one thread that waits here, the owner; other threads only `post`, `wake` and `drain`."""

    def __init__(self) -> None:
        self._posted: deque[Callable[[], None]] = deque()
        self._asleep = False  # the owner is about to block, or does: a post must wake it
        self._woken = False
        self._selector = selectors.DefaultSelector()
        woken, self._waker = os.pipe()
        for end in (woken, self._waker):
            os.set_blocking(end, False)
        self._selector.register(woken, READABLE, lambda _: _empty(woken))
        self._turn = threading.Lock()  # held while things are handled, so that `drain` can stand in for the owner
        weakref.finalize(self, _close, self._selector, woken, self._waker)

    def post(self, action: Callable[[], None]) -> None:
        """`action` runs on the owner's thread, after all that was posted before it. From any thread."""
        self._posted.append(action)
        if self._asleep:
            self._asleep = False
            os.write(self._waker, b"\0")

    def wake(self) -> None:
        """Ends the owner's `wait`, or its next one. From any thread."""
        self._woken = True
        if self._asleep:
            self._asleep = False
            os.write(self._waker, b"\0")

    def watch(self, sock: socket.socket, ready: Callable[[int], None], events: int = READABLE) -> None:
        """Calls `ready(READABLE | WRITABLE)` whenever `sock` is; replaces what was asked for before."""
        if sock.fileno() in self._selector.get_map():
            self._selector.modify(sock, events, ready)
        else:
            self._selector.register(sock, events, ready)

    def unwatch(self, sock: socket.socket) -> None:
        if sock.fileno() in self._selector.get_map():
            self._selector.unregister(sock)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Handles what has come; blocks for the first of it for up to `timeout_s` seconds, None = for ever.

        Returns whether a socket was ready. Each is asked once: where more may lie in it, wait again.
        """
        with self._turn:
            if self._run_posted():
                timeout_s = 0.0
            self._asleep = timeout_s != 0.0
            if self._posted or self._woken:  # by somebody who saw us awake
                timeout_s = 0.0
            events = self._selector.select(timeout_s)
            self._asleep = self._woken = False
            for key, mask in events:
                try:
                    key.data(mask)
                except Exception:
                    _log.exception("what came by a socket could not be handled")
            self._run_posted()
            return bool(events)

    def drain(self) -> None:
        """Sees to it that what is posted has run, whether the owner still waits here or not: for who closes up."""
        self.wake()
        while self._posted:
            if self._turn.acquire(timeout=0.01):  # the owner, where there is one, has it nearly all the time
                try:
                    self._run_posted()
                finally:
                    self._turn.release()

    def _run_posted(self) -> bool:
        ran = False
        while self._posted:
            ran = True
            try:
                self._posted.popleft()()
            except Exception:  # a bug in the handling of one must not take the thread, and with it all others, down
                _log.exception("what was posted could not be handled")
        return ran


def _empty(woken: int) -> None:
    os.read(woken, 4096)


def _close(selector: selectors.BaseSelector, *ends: int) -> None:
    selector.close()
    for end in ends:
        os.close(end)
