"""How a trial is judged: what does not hold is named, what holds is not, and a fault that cannot happen is skipped by name."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import repeat
from random import Random
from typing import Any

import pytest

from moiety.client import Chunk
from moiety.errors import FailedPrecondition, MoietyError, PeerLost
from moiety.tools.chaos import trials
from moiety.tools.chaos.fault import DidNotHold, Kind, System
from moiety.tools.chaos.meters import Usage
from moiety.tools.chaos.report import rows_of
from moiety.tools.chaos.schedule import Planned
from moiety.tools.chaos.trials import Outcome, run_trials

IDLE = Usage(rss_mib={"router#1": 100}, descriptors={"router#1": 20}, segments=2, keys=10, blocked=())


class World:
    """A system, its client and its meters in one: streams are a function of their prompt, until a fault changes them."""

    address = "nowhere"

    def __init__(self) -> None:
        self.token = 0  # added to every token
        self.pause_s = 0.0  # before every token
        self.error: MoietyError | None = None
        self.usage = IDLE

    async def __aenter__(self) -> World:
        return self

    async def __aexit__(self, *_: object) -> None: ...

    async def generate(self, prompt: list[int], *, max_tokens: int, **_: Any) -> AsyncIterator[Chunk]:
        for position in range(max_tokens):
            await asyncio.sleep(max(self.pause_s, 0.0005))
            if self.error is not None:
                raise self.error
            yield Chunk(text="", token_ids=(sum(prompt) + position + self.token,))

    async def repair(self) -> None: ...


async def run(
    monkeypatch: pytest.MonkeyPatch,
    strike: Callable[[World], None],
    *,
    kind: dict[str, Any] | None = None,
    faults: int = 1,
) -> Outcome:
    """Runs one trial in which `strike` changes the world, and which takes it back at the end."""
    world = World()

    async def read_usage(_: System) -> Usage:
        return world.usage

    @asynccontextmanager
    async def cause(_: System, __: Random) -> AsyncIterator[str]:
        strike(world)
        try:
            yield "struck"
        finally:
            world.token, world.pause_s, world.error = 0, 0.0, None

    monkeypatch.setattr(trials, "Client", lambda _, **__: world)
    monkeypatch.setattr(trials, "read_usage", read_usage)
    made = Kind("test-strike", "struck", "all", 0.25, cause, lasts_s=0.3, **(kind or {}))
    return await run_trials(
        world,  # type: ignore[arg-type]
        repeat(Planned(made, 5, 0)),
        faults=faults,
        seconds=None,
        slack=1.0,
        say=lambda _: None,
    )


def broken(outcome: Outcome) -> str:
    """Returns what did not hold in the only trial."""
    (trial,) = outcome.trials
    return "; ".join(trial.broken)


async def test_nothing_is_wrong_where_nothing_happens(monkeypatch: pytest.MonkeyPatch):
    """Without an effect every stream is identical, the run passes, and the table has one row."""
    outcome = await run(monkeypatch, lambda world: None)
    assert outcome.passed
    (row,) = rows_of(outcome, 1.0)
    assert row.requests == row.identical > 0
    assert row.failed == 0


async def test_a_changed_token_is_found(monkeypatch: pytest.MonkeyPatch):
    """Tokens that differ from the quiet run's make the trial fail."""
    outcome = await run(monkeypatch, lambda world: setattr(world, "token", 1))
    assert "have other tokens" in broken(outcome)
    assert not outcome.passed


async def test_a_gap_beyond_the_bound_is_found(monkeypatch: pytest.MonkeyPatch):
    """A stream that waits longer than the kind allows is named with both numbers."""
    outcome = await run(monkeypatch, lambda world: setattr(world, "pause_s", 0.28))
    assert "a stream waited 0." in broken(outcome)
    assert "at most 0.25 s are allowed" in broken(outcome)


async def test_failed_requests_count_unless_the_kind_breaks_streams(monkeypatch: pytest.MonkeyPatch):
    """A failed request is named with its error; where the only gateway is gone, UNAVAILABLE is what clients must get."""
    lost = PeerLost("gone")
    outcome = await run(monkeypatch, lambda world: setattr(world, "error", lost))
    assert "requests failed, such as PeerLost: gone" in broken(outcome)
    assert (await run(monkeypatch, lambda world: setattr(world, "error", lost), kind={"may_break": True})).passed
    other = await run(monkeypatch, lambda world: setattr(world, "error", MoietyError("bug")), kind={"may_break": True})
    assert "such as MoietyError: bug" in broken(other)


@pytest.mark.parametrize(
    ("left", "named"),
    [
        ({"rss_mib": {"router#1": 400}}, "300 MiB of memory in router#1 more than before"),
        ({"descriptors": {"router#1": 60}}, "40 descriptors more"),
        ({"segments": 9}, "7 segments more"),
        ({"keys": 500}, "490 registry keys more"),
        ({"blocked": ("router#1",)}, "router#1 does not give all its KV blocks to one request"),
    ],
)
async def test_what_is_left_behind_is_found(monkeypatch: pytest.MonkeyPatch, left: dict[str, Any], named: str):
    """Each kind of leak is named with its amount."""
    usage = Usage(**{**{name: getattr(IDLE, name) for name in IDLE.__slots__}, **left})
    outcome = await run(monkeypatch, lambda world: setattr(world, "usage", usage))
    assert named in broken(outcome)


async def test_a_fault_may_say_itself_what_did_not_hold(monkeypatch: pytest.MonkeyPatch):
    """DidNotHold from a fault makes the trial fail with its message."""

    def strike(_: World) -> None:
        raise DidNotHold("it did not come back")

    assert broken(await run(monkeypatch, strike)) == "it did not come back"


async def test_what_cannot_happen_here_is_skipped_by_name(monkeypatch: pytest.MonkeyPatch):
    """A kind that this machine cannot have is skipped with the reason, however often it is planned; no trial is no success."""

    def strike(_: World) -> None:
        raise FailedPrecondition("no such cable")

    outcome = await run(monkeypatch, strike, faults=3)
    assert outcome.skipped == {"test-strike": "no such cable"}
    assert not outcome.passed
