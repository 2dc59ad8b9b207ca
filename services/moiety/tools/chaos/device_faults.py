"""Devices that raise, hang, compute nonsense or slow down while the process lives."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from random import Random

from moiety.core.replica import Role
from moiety.errors import FailedPrecondition
from moiety.tools.chaos.fault import Kind, System, one_of

SICK_S = 2.0  # longest gap while another holder can do the work


@asynccontextmanager
async def _sick(fault: str, system: System, random: Random) -> AsyncIterator[str]:
    victim = one_of(system, Role.EXPERT, random)
    await system.set_fault(victim, fault)
    try:
        yield f"device of {victim.id}: {fault}"
    finally:
        with suppress(FailedPrecondition):  # it may have been replaced
            await system.set_fault(victim, "")


def _kind(name: str, fault: str, does: str, holds: str) -> Kind:
    return Kind(name, f"{does}, on one of two holders", holds, SICK_S, partial(_sick, fault), on_ray=False)


KINDS = (
    _kind("device-raise", "raise", "every batch raises", "its calls are sent to the other holder, and it is suspected"),
    _kind("device-nan", "nan", "every batch gives NaN", "its rows are computed again elsewhere, and it is suspected"),
    _kind("device-hang", "hang", "no batch ends", "hedges go to the other holder, and it is declared sick"),
    _kind(
        "device-slow",
        "slow 0.2",
        "every batch takes 0.2 s longer",
        "hedges go to the other holder, and nobody is killed",
    ),
)
