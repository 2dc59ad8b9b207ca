"""Bad networks: connections that are reset, half-open, refused or slow, between one service and all that call it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random

from moiety.core.replica import Replica, Role
from moiety.tools.chaos.fault import Kind, System, one_of

LINK_S = 2.0  # longest gap while another way is open
DELAY_S = 0.05


def _victim(system: System, random: Random) -> Replica:
    return one_of(system, random.choice((Role.EXPERT, Role.ROUTER)), random)


@asynccontextmanager
async def _reset(system: System, random: Random) -> AsyncIterator[str]:
    victim = _victim(system, random)
    relay = system.relay(victim)
    count = relay.connections
    relay.reset()
    yield f"reset {count} connections to {victim.id}"


@asynccontextmanager
async def _half_open(system: System, random: Random) -> AsyncIterator[str]:
    victim = _victim(system, random)
    relay = system.relay(victim)
    relay.stall(True)
    try:
        yield f"{relay.connections} connections to {victim.id} are half-open"
    finally:
        relay.stall(False)


@asynccontextmanager
async def _refused(system: System, random: Random) -> AsyncIterator[str]:
    victim = _victim(system, random)
    relay = system.relay(victim)
    relay.refuses = True
    relay.reset()
    try:
        yield f"connections to {victim.id} are reset and refused"
    finally:
        relay.refuses = False


@asynccontextmanager
async def _delayed(system: System, random: Random) -> AsyncIterator[str]:
    victim = _victim(system, random)
    relay = system.relay(victim)
    relay.delay_s = DELAY_S
    try:
        yield f"bytes to and from {victim.id} are {1000 * DELAY_S:g} ms late"
    finally:
        relay.delay_s = 0.0


KINDS = (
    Kind(
        "link-reset",
        "every TCP connection to an expert replica or router is reset once",
        "its calls or streams move at once; it is dialled again",
        LINK_S,
        _reset,
        lasts_s=2.0,
        on_ray=False,
    ),
    Kind(
        "link-halfopen",
        "every TCP connection to an expert replica or router stays open and passes nothing on",
        "keepalive notices it; its calls or streams move",
        LINK_S,
        _half_open,
        on_ray=False,
    ),
    Kind(
        "link-refuse",
        "TCP connections to an expert replica or router are reset, and new ones refused",
        "its calls or streams move",
        LINK_S,
        _refused,
        on_ray=False,
    ),
    Kind(
        "link-delay",
        f"{1000 * DELAY_S:g} ms of delay each way, to and from an expert replica or router",
        "streams go on; nobody is declared dead",
        LINK_S,
        _delayed,
        on_ray=False,
    ),
)
