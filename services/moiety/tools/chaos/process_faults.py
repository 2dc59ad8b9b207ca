"""Processes that are killed or stopped."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from random import Random

from moiety.core.replica import Role
from moiety.tools.chaos.fault import Fault, Kind, System, one_of

KILLED_S, HUNG_S = 0.4, 2.0  # longest gap while another process can do the work


@asynccontextmanager
async def _signalled(role: Role, number: signal.Signals, system: System, random: Random) -> AsyncIterator[str]:
    victim = one_of(system, role, random)
    os.kill(victim.pid, number)
    try:
        yield f"{number.name} to {victim.id}"
    finally:
        with suppress(ProcessLookupError):
            os.kill(victim.pid, signal.SIGCONT)


def _signals(role: Role, number: signal.Signals) -> Callable[[System, Random], Fault]:
    return partial(_signalled, role, number)


KINDS = (
    Kind(
        "expert-kill",
        "kill -9 of one of two holders",
        "the other holder answers its calls",
        KILLED_S,
        _signals(Role.EXPERT, signal.SIGKILL),
        lasts_s=2.0,
    ),
    Kind(
        "expert-stop",
        "SIGSTOP of one of two holders, later SIGCONT",
        "hedges go to the other holder",
        HUNG_S,
        _signals(Role.EXPERT, signal.SIGSTOP),
    ),
    Kind(
        "router-kill",
        "kill -9 of one of two routers",
        "the gateway resumes its streams on the other router",
        KILLED_S,
        _signals(Role.ROUTER, signal.SIGKILL),
        lasts_s=2.0,
    ),
    Kind(
        "router-stop",
        "SIGSTOP of one of two routers, later SIGCONT",
        "the gateway resumes its streams on the other router",
        HUNG_S,
        _signals(Role.ROUTER, signal.SIGSTOP),
    ),
    Kind(
        "gateway-stop",
        "SIGSTOP of the only gateway, later SIGCONT",
        "clients soon get UNAVAILABLE; the gateway serves again when it goes on",
        HUNG_S,
        _signals(Role.GATEWAY, signal.SIGSTOP),
        may_break=True,
    ),
)
