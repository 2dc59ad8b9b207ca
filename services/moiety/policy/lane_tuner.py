"""Decides step by step whether to split a batch into lanes, by measuring steps with and without them.

Lanes hide the hop behind the attention of another micro-batch, but every lane reads the weights it needs again. Known
systems lost a quarter of their speed with lanes at small batches and gained at large ones. So each step size is tried both
ways in turn, the better way is kept, and the comparison is repeated at growing intervals.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from statistics import median

TRIALS = 5  # steps each way before a verdict; taken in turn, so that drift affects both alike
# Lanes lose early if, after CLEAR_TRIALS steps each way, their best step takes CLEAR times the worst step without lanes.
CLEAR, CLEAR_TRIALS = 1.1, 2
GAIN = 0.97  # lanes must take at most this fraction of the time without them: a draw is not worth their variance
# Steps between two comparisons; at first 2 % of the steps are trials, later fewer.
FIRST_REST, LONGEST_REST = 256, 16384


@dataclass(slots=True)
class _Size:
    """The measurements of one step size."""

    times: dict[int, list[float]]  # lanes -> seconds of this comparison's trials
    best: int = 1
    resting: int = 0  # steps until the next comparison
    rest: int = FIRST_REST


@dataclass(slots=True)
class LaneTuner:
    """Chooses 1 or `most` lanes for each step size. For one thread."""

    most: int = 2
    _sizes: dict[Hashable, _Size] = field(default_factory=dict)

    def choose(self, size: Hashable) -> int:
        """Returns how many lanes the next step of `size` should run in. The caller passes that step's time to `observe`."""
        known = self._sizes.get(size)
        if known is None:
            known = self._sizes[size] = _Size({1: [], self.most: []})
        if known.resting:
            known.resting -= 1
            return known.best
        return 1 if len(known.times[1]) <= len(known.times[self.most]) else self.most

    def observe(self, size: Hashable, lanes: int, seconds: float) -> None:
        """Records how long a step with `lanes` lanes took."""
        known = self._sizes[size]
        if known.resting:
            return
        known.times[lanes].append(seconds)
        if all(len(times) >= TRIALS for times in known.times.values()) or self._clearly_lost(known):
            # Medians, because a step may be slow for other reasons: a garbage collection, a hedge.
            won = median(known.times[self.most]) <= GAIN * median(known.times[1])
            best = self.most if won else 1
            known.rest = min(2 * known.rest, LONGEST_REST) if best == known.best else FIRST_REST
            known.best, known.resting = best, known.rest
            known.times = {1: [], self.most: []}

    def _clearly_lost(self, known: _Size) -> bool:
        lanes, without = known.times[self.most], known.times[1]
        return min(len(lanes), len(without)) >= CLEAR_TRIALS and min(lanes) > CLEAR * max(without)

    def verdicts(self) -> dict[Hashable, int]:
        """Returns, for each step size, the lane count that won its last comparison; 1 until a comparison has ended."""
        return {size: known.best for size, known in self._sizes.items()}
