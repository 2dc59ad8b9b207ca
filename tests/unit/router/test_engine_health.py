"""The health of a router's engine: a thread that does not turn is sick, one that waits for experts is not."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from engine_support import CountingModel, engine_of, prompt_of, submit

from moiety.core.progress import FIRST_S
from moiety.errors import MoietyError, Unavailable
from moiety.router.engine import Engine
from moiety.router.engine_health import LEAST_S, EngineHealth
from moiety.testing import eventually
from moiety.wire.transports.mailbox import Mailbox


class Clock:
    """Looks at an engine once a second of a clock of its own."""

    def __init__(self, engine: Engine, mailbox: Mailbox) -> None:
        self._health, self._now = EngineHealth(engine, mailbox), 0.0

    def look(self, seconds: float = 1.0) -> str:
        """Looks for so many seconds, which take no time; returns what the last look found."""
        problem = ""
        for _ in range(int(seconds)):
            self._now += 1.0
            try:
                self._health.check(self._now)
                problem = ""
            except Unavailable as error:
                problem = str(error)
        return problem


@pytest.fixture
def model() -> CountingModel:
    """The engine's model."""
    return CountingModel()


@pytest.fixture
def engine(model: CountingModel) -> Iterator[Engine]:
    """A running engine."""
    engine = engine_of(model)
    engine.start()
    yield engine
    model.before = lambda _: None
    engine.stop(10)


async def turned(engine: Engine) -> None:
    """Waits until the engine's thread has turned."""
    before = engine.turns
    await eventually(lambda: engine.turns > before)


@pytest.mark.parametrize(("steps", "limit"), [(0, FIRST_S), (1, LEAST_S)])
async def test_a_step_that_hangs_is_sickness_until_it_ends(
    engine: Engine, model: CountingModel, steps: int, limit: float
):
    """A thread that neither turns nor waits is sick after LEAST_S, FIRST_S in its first step, and well once it turns again."""
    for _ in range(steps):
        _, listener = submit(engine, prompt_of(1, 4), max_tokens=1)
        await eventually(listener.ended.is_set)
    clock, released, reached = Clock(engine, Mailbox()), threading.Event(), threading.Event()
    assert not clock.look()
    await turned(engine)
    assert not clock.look()

    def hang(_: object) -> None:
        reached.set()
        released.wait(30)

    model.before = hang
    submit(engine, prompt_of(1, 4))
    assert reached.wait(10)
    assert not clock.look(limit)
    assert clock.look(2.0).startswith("the engine is sick: no progress for")
    released.set()
    await turned(engine)
    assert not clock.look()


async def test_waiting_for_experts_is_no_sickness(engine: Engine, model: CountingModel):
    """A step that sleeps in the mailbox for minutes, because experts are missing, is well."""
    mailbox, over = Mailbox(), threading.Event()
    clock = Clock(engine, mailbox)

    def wait_for_experts(_: object) -> None:
        while not over.is_set():
            mailbox.wait(30.0)

    model.before = wait_for_experts
    _, listener = submit(engine, prompt_of(1, 4))
    await eventually(lambda: mailbox.asleep)
    assert not clock.look(600.0)
    over.set()
    mailbox.wake()
    await eventually(lambda: listener.end is not None)


async def test_steps_that_fail_one_after_another_are_sickness(
    engine: Engine, model: CountingModel, caplog: pytest.LogCaptureFixture
):
    """One failed step is bad luck; three in a row are sickness, with one traceback in the log; a good step ends it."""
    health = EngineHealth(engine, Mailbox())

    async def step(fails: bool) -> None:
        def fail(_: object) -> None:
            raise ValueError("a bug")

        model.before = fail if fails else lambda _: None
        _, listener = submit(engine, prompt_of(1, 4), max_tokens=1)
        await eventually(lambda: listener.end is not None)
        assert isinstance(listener.end.error, MoietyError) is fails
        await turned(engine)

    for _ in range(2):
        await step(fails=True)
        health.check(time.monotonic())
    await step(fails=False)
    for _ in range(2):
        await step(fails=True)
        health.check(time.monotonic())
    await step(fails=True)
    with pytest.raises(Unavailable, match="the engine is sick: 3 units of work failed in a row"):
        health.check(time.monotonic())
    await step(fails=False)
    health.check(time.monotonic())
    assert len([record for record in caplog.records if record.exc_info]) == 1
