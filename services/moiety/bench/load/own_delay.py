"""How late the load generator itself was. A generator that cannot keep up measures itself, not the server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from moiety.bench.report import percentile

LATE_MS = 10.0  # a generator that is later than this distorts a time to first token
BUSY = 0.9  # of one core: the generator is one thread
_EVERY_S = 0.02


@dataclass(frozen=True, slots=True)
class OwnDelay:
    """The generator's own delays. A closed loop has no times at which requests should be sent: there `sent_late` is None."""

    sent_late_p99_ms: float | None
    sent_late_max_ms: float | None
    loop_delay_p99_ms: float  # how late the event loop runs what is due: so late may it read an event
    cpu_fraction: float  # of one core

    @property
    def bottleneck(self) -> str | None:
        """What shows that the generator was the bottleneck; None where nothing does."""
        if self.sent_late_p99_ms is not None and self.sent_late_p99_ms > LATE_MS:
            return f"it sent 1 % of the requests at least {self.sent_late_p99_ms:.0f} ms late"
        if self.loop_delay_p99_ms > LATE_MS:
            return f"1 % of what it was to do was at least {self.loop_delay_p99_ms:.0f} ms late"
        if self.cpu_fraction > BUSY:
            return f"it used {100 * self.cpu_fraction:.0f} % of the one core that it can use"
        return None


class OwnDelayMeter:
    """Measures this process's delays between `start` and `read`."""

    def __init__(self) -> None:
        self._began = self._cpu = 0.0
        self._delays: list[float] = []

    def start(self) -> None:
        """Begins, in the present."""
        self._began, self._cpu, self._delays = time.monotonic(), time.process_time(), []

    async def watch(self) -> None:
        """Measures the event loop's delay until it is cancelled."""
        while True:
            due = time.monotonic() + _EVERY_S
            await asyncio.sleep(_EVERY_S)
            self._delays.append(time.monotonic() - due)

    def read(self, sent_late_s: Sequence[float] | None) -> OwnDelay:
        """Returns the delays since `start`. `sent_late_s`: how late each request of an open loop was sent."""
        late, delays = sorted(sent_late_s or ()), self._delays or [0.0]
        wall_s = time.monotonic() - self._began
        return OwnDelay(
            sent_late_p99_ms=1000 * percentile(late, 99) if late else None,
            sent_late_max_ms=1000 * late[-1] if late else None,
            loop_delay_p99_ms=1000 * percentile(delays, 99),
            cpu_fraction=(time.process_time() - self._cpu) / wall_s if wall_s > 0 else 0.0,
        )
