"""The mailbox, where a computing thread waits for messages on its sockets and for actions that other threads post.

A router's engine thread owns a mailbox, and so does an expert replica's runtime thread. The thread that computes reads
its sockets itself, so a message that announces work is not handed from one thread to another. Such a hand-over costs more
than everything else between the message and the work.
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
    """Belongs to one thread, the owner, which waits here. Other threads may only call `post`, `wake` and `drain`."""

    def __init__(self) -> None:
        self._posted: deque[Callable[[], None]] = deque()
        self._asleep = False  # the owner blocks or is about to: a post must wake it
        self._woken = False
        self.turns = 0  # how often the owner has been here: a health check sees from it that the owner gets on
        self._selector = selectors.DefaultSelector()
        woken, self._waker = os.pipe()
        for end in (woken, self._waker):
            os.set_blocking(end, False)
        self._selector.register(woken, READABLE, lambda _: _empty(woken))
        self._turn = threading.Lock()  # held while actions run, so that `drain` can stand in for the owner
        weakref.finalize(self, _close, self._selector, woken, self._waker)

    def post(self, action: Callable[[], None]) -> None:
        """Runs `action` on the owner's thread, after all actions posted earlier. May be called from any thread."""
        self._posted.append(action)
        if self._asleep:
            self._asleep = False
            os.write(self._waker, b"\0")

    def wake(self) -> None:
        """Makes the owner's current `wait` return, or its next one if the owner is busy now. May be called from any thread."""
        self._woken = True
        if self._asleep:
            self._asleep = False
            os.write(self._waker, b"\0")

    @property
    def asleep(self) -> bool:
        """Whether the owner waits here and nothing has come."""
        return self._asleep

    def watch(self, sock: socket.socket, ready: Callable[[int], None], events: int = READABLE) -> None:
        """Makes `wait` call `ready(mask)` whenever `sock` is ready for one of `events`.

        The mask is READABLE, WRITABLE or both. Replaces an earlier watch of the same socket.
        """
        if sock.fileno() in self._selector.get_map():
            self._selector.modify(sock, events, ready)
        else:
            self._selector.register(sock, events, ready)

    def unwatch(self, sock: socket.socket) -> None:
        if sock.fileno() in self._selector.get_map():
            self._selector.unregister(sock)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Handles ready sockets and posted actions. If there are none, waits up to `timeout_s` seconds (None: no limit).

        Returns whether a socket was ready. A ready socket is handled once and may hold further messages. So call `wait` again
        if it returned True.
        """
        self.turns += 1
        with self._turn:
            if self._run_posted():
                timeout_s = 0.0
            self._asleep = timeout_s != 0.0
            if self._posted or self._woken:  # by a thread that read `_asleep` before it was set
                timeout_s = 0.0
            events = self._selector.select(timeout_s)
            self._asleep = self._woken = False
            for key, mask in events:
                try:
                    key.data(mask)
                except Exception:
                    _log.exception("handling a ready socket failed")
            self._run_posted()
            return bool(events)

    def drain(self) -> None:
        """For shutdown: returns once no posted action is left. Runs the actions itself if the owner no longer calls `wait`."""
        self.wake()
        while self._posted:
            if self._turn.acquire(timeout=0.01):  # a living owner holds it nearly all the time
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
            except Exception:  # a bug in one action must not end the thread that handles all the others
                _log.exception("a posted action failed")
        return ran


def _empty(woken: int) -> None:
    os.read(woken, 4096)


def _close(selector: selectors.BaseSelector, *ends: int) -> None:
    selector.close()
    for end in ends:
        os.close(end)
