"""Keeps a service's registry entry alive, and runs the service's periodic actions, such as load reports."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from moiety.core.replica import Replica
from moiety.core.supervise import supervise
from moiety.errors import MoietyError, RegistryUnreachable, WritesRefused
from moiety.registry.interface import HEARTBEAT_S, Registry

STOP_S = 1.0

_HEARTBEAT = "heartbeat"
_log = logging.getLogger(__name__)


class Heartbeat:
    """Registers a replica every `interval_s` seconds (a beat) between `start` and `stop`.

    `replica` is the registry entry, or a function that returns the current entry. Each action of `on_beat` also runs
    every `interval_s` seconds, in a task of its own, so a slow action delays no other. An action that raises a MoietyError
    or an OSError is called again at the next beat. Any other failure is a bug, which `supervise` handles.
    """

    def __init__(
        self,
        registry: Registry,
        replica: Replica | Callable[[], Replica],
        *,
        on_beat: Sequence[Callable[[], Awaitable[None]]] = (),
        require: bool = False,
        interval_s: float = HEARTBEAT_S,
    ) -> None:
        self._registry = registry
        self._current = (lambda: replica) if isinstance(replica, Replica) else replica
        self._on_beat = on_beat
        self._require = require
        self._interval_s = interval_s
        self._stopping = asyncio.Event()
        self._beat_task: asyncio.Task[None] | None = None
        self.trouble: str | None = None  # why the registry did not take the last beat
        self._action_tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Registers at once, then at every beat.

        If `require` is set and the registry does not answer at first, raises RegistryUnreachable. One that refuses writes is
        no error: the service is found once the registry takes them.
        """
        reported: type[Exception] | None = None
        try:
            await self.beat()
        except RegistryUnreachable as error:
            if self._require and not isinstance(error, WritesRefused):
                raise
            reported = self._report(_HEARTBEAT, error)
        self._beat_task = supervise(_HEARTBEAT, lambda: self._repeat(self.beat, _HEARTBEAT, self._interval_s, reported))
        self._action_tasks = [
            supervise("action at a beat", partial(self._repeat, action, getattr(action, "__qualname__", repr(action))))
            for action in self._on_beat
        ]

    async def beat(self) -> None:
        """Registers at once, for example to publish a changed state before the next beat. Raises RegistryUnreachable."""
        try:
            await self._registry.register(self._current())
        except RegistryUnreachable as error:
            self.trouble = str(error)
            raise
        self.trouble = None

    async def stop(self) -> None:
        """Stops the beats and deregisters, within STOP_S. A failure to deregister is only logged: the entry expires."""
        self._stopping.set()
        for task in self._action_tasks:
            task.cancel()
        # Let the beat in flight end: if it were cancelled, its entry could reach the store after the removal.
        running = [*self._action_tasks, *([self._beat_task] if self._beat_task else [])]
        if running:
            _, late = await asyncio.wait(running, timeout=STOP_S / 2)
            for task in late:
                task.cancel()
        try:
            async with asyncio.timeout(STOP_S / 2):
                await self._registry.deregister(self._current().id)
        except Exception as error:
            _log.info("not deregistered, the entry will expire: %s", str(error) or "no answer in time")

    async def _repeat(
        self,
        action: Callable[[], Awaitable[None]],
        name: str,
        wait_s: float = 0.0,
        reported: type[Exception] | None = None,
    ) -> None:
        """Calls `action` every `interval_s` seconds, the first time after `wait_s`. Logs each change of how it ends.

        `reported` is the kind of failure that was logged last, None if it works.
        """
        clock = asyncio.get_running_loop().time
        due = clock() + wait_s
        while not await self._stopped_within(due - clock()):
            due = clock() + self._interval_s
            try:
                await action()
            except (MoietyError, OSError) as error:
                if type(error) is not reported:
                    reported = self._report(name, error) or reported
            else:
                if reported is not None:
                    _log.warning("%s of %s works again", name, self._current().id)
                reported = None

    def _report(self, name: str, error: MoietyError | OSError) -> type[Exception] | None:
        """Logs that `name` failed; a registry outage is logged only for the heartbeat. Returns the error's type if logged."""
        outage = isinstance(error, RegistryUnreachable)
        if outage and name != _HEARTBEAT:
            return None
        _log.warning("%s of %s: %s", name, self._current().id, error, exc_info=None if outage else error)
        return type(error)

    async def _stopped_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(max(seconds, 0.0)):
                await self._stopping.wait()
        except TimeoutError:
            pass
        return self._stopping.is_set()
