"""Decides, step by step, whether splitting a batch into lanes pays: by measuring both, never by belief.

Lanes hide the hop behind the attention of another micro-batch, but every lane streams the weights it needs again: known
systems lose a quarter of their speed with them at small batches and win at large ones. So each size of step is tried both
ways in turns, the better way is kept, and the other is tried again ever more rarely.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from statistics import median

TRIALS = 5  # steps each way before a verdict; taken in turns, so that drift hits both alike
CLEAR, CLEAR_TRIALS = (
    1.1,
    2,
)  # lanes whose best of so few steps takes so much longer than the worst without lose at once
GAIN = 0.97  # lanes must take at most this fraction of the time without them: a draw is not worth their variance
FIRST_REST, LONGEST_REST = 256, 16384  # steps between two comparisons: at most 2 % of steps are trials, then ever fewer


@dataclass(slots=True)
class _Size:
    """What is known of one size of step."""

    times: dict[int, list[float]]  # lanes -> seconds of the trials of this comparison
    best: int = 1
    resting: int = 0  # steps until the next comparison
    rest: int = FIRST_REST


@dataclass(slots=True)
class LaneTuner:
    """Chooses 1 or `most` lanes for each size of step. For one thread."""

    most: int = 2
    _sizes: dict[Hashable, _Size] = field(default_factory=dict)

    def choose(self, size: Hashable) -> int:
        """How many lanes the next step of this size should run in; its time goes to `observe`."""
        known = self._sizes.get(size)
        if known is None:
            known = self._sizes[size] = _Size({1: [], self.most: []})
        if known.resting:
            known.resting -= 1
            return known.best
        return 1 if len(known.times[1]) <= len(known.times[self.most]) else self.most

    def observe(self, size: Hashable, lanes: int, seconds: float) -> None:
        """Tells how long a step took that ran in `lanes` lanes."""
        known = self._sizes[size]
        if known.resting:
            return
        known.times[lanes].append(seconds)
        if all(len(times) >= TRIALS for times in known.times.values()) or self._clearly_lost(known):
            # Medians: one step that met a garbage collection or a hedge says nothing about lanes.
            won = median(known.times[self.most]) <= GAIN * median(known.times[1])
            best = self.most if won else 1
            known.rest = min(2 * known.rest, LONGEST_REST) if best == known.best else FIRST_REST
            known.best, known.resting = best, known.rest
            known.times = {1: [], self.most: []}

    def _clearly_lost(self, known: _Size) -> bool:
        lanes, without = known.times[self.most], known.times[1]
        return min(len(lanes), len(without)) >= CLEAR_TRIALS and min(lanes) > CLEAR * max(without)

    def verdicts(self) -> dict[Hashable, int]:
        """Size -> the number of lanes that won there last."""
        return {size: known.best for size, known in self._sizes.items()}
