"""Whether a router's engine gets on: its thread must turn, and its steps must not fail one after another."""

from __future__ import annotations

from moiety.core.progress import Progress
from moiety.errors import Unavailable
from moiety.router.engine import Engine
from moiety.wire.transports.mailbox import Mailbox

LEAST_S = 10.0  # one layer's attention over a long context takes seconds on few cores


class EngineHealth:
    """Looks at an engine from outside. The engine's thread pays for it with two counters.

    An engine that waits for experts, however long, is well: its thread turns or sleeps in the mailbox.
    """

    def __init__(self, engine: Engine, mailbox: Mailbox):
        self._engine, self._mailbox = engine, mailbox
        self._turns = -1
        self._progress = Progress(1, LEAST_S)
        self.hangs = False  # at the last check

    def check(self, now: float) -> None:
        """Raises Unavailable if the engine is sick. Call it about once a second; `now` is monotonic, in seconds."""
        if not self._engine.alive:
            raise Unavailable("the engine's thread has ended")
        turns = self._engine.turns + self._mailbox.turns
        if turns != self._turns or self._mailbox.asleep:
            self._turns = turns
            if self._engine.stepped:  # idle turns do not show how long a step takes
                self._progress.end(now)
            self._progress.begin(now)
        hang = self._progress.problem(now)
        self.hangs = bool(hang)
        if problem := hang or self._engine.steps.problem(now):
            raise Unavailable(f"the engine is sick: {problem}")
