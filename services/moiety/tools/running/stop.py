"""Ends a system that `moiety serve` runs on this machine, as SIGTERM does, and waits until its process is gone."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress

from moiety.config.running_systems import RunningSystem, is_running
from moiety.core.system import SystemId
from moiety.errors import FailedPrecondition, RegistryUnreachable, Unavailable
from moiety.registry.connect import connect
from moiety.registry.interface import Registry

POLL_S = 0.2
# After this time the second signal is sent, which ends the system without a wait. Sooner, both would count as one.
AGAIN_S = 1.0


async def stop_system(
    system: RunningSystem, *, now: bool, timeout_s: float | None, progress: Callable[[str], None]
) -> None:
    """Ends `system`; returns once its process is gone. Tells `progress` which replicas are left, at each change.

    By default running requests finish first, as the settings of the system allow. `now`: it ends at once.
    Raises FailedPrecondition if its process may not be signalled, Unavailable if it is not gone after `timeout_s` seconds.
    """
    began = time.monotonic()
    _signal(system)
    progress(f"{system}: {'ends at once' if now else 'running requests finish, then it ends'}")
    registry = connect(system.registry, SystemId.parse(system.system)) if system.system else None
    left, again = "", now
    try:
        while is_running(system):
            waited = time.monotonic() - began
            if again and waited > AGAIN_S:
                again = False
                _signal(system)
            if timeout_s is not None and waited > timeout_s:
                raise Unavailable(
                    f"{system} has not ended after {timeout_s:g} s, and goes on ending: --now ends it at once"
                )
            if registry is not None and (names := await _left(registry)) and names != left:
                left = names
                progress(f"left: {left}")
            await asyncio.sleep(POLL_S)
    finally:
        if registry is not None:
            await registry.close()
    progress(f"{system.app} has ended")


async def _left(registry: Registry) -> str:
    """Returns which replicas are still there, in words; empty if none is, or the registry has ended."""
    with suppress(RegistryUnreachable):
        return ", ".join(f"{one.deployment} {one.id} ({one.state})" for one in await registry.replicas())
    return ""


def _signal(system: RunningSystem) -> None:
    try:
        os.kill(system.pid, signal.SIGTERM)
    except ProcessLookupError:
        return
    except PermissionError:
        raise FailedPrecondition(f"{system}: process {system.pid} belongs to another user") from None
