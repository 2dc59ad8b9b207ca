"""Tells a sick device from rows that really overflow: finds rows with NaN or Inf, and keeps who returned them.

A replica that returns NaN or Inf for finite rows is at fault, unless a second replica returns them for the same rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from moiety.router.hop.breaker import Breakers
from moiety.router.hop.call import RoutedRows
from moiety.wire.finite import all_finite, non_finite_rows


class ReturnedRows:
    """Who returned each of a layer's A results, and who is to blame for those that are not finite."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._returned: list[tuple[str, np.ndarray]] = []  # replica, assignments; a later entry replaces an earlier one
        # replica -> bool [A]: the results that it returned non-finite for finite rows
        self._doubted: dict[str, np.ndarray] = {}
        self._agreed: np.ndarray | None = None  # [A]: how many trusted replicas did so; None: none yet

    def add(self, replica: str, assignments: np.ndarray) -> None:
        self._returned.append((replica, assignments))

    def to_compute_again(self, rows: RoutedRows, breakers: Breakers, now: float) -> Mapping[str, np.ndarray]:
        """Returns the results that must not be used, by the replica that returned them. Called when all A results are there.

        Two replicas that agree prove a row: a model may overflow, and then the reference returns the same. Notes in
        `breakers` who answered well, and who returned NaN or Inf where another holder did not.
        """
        if self._agreed is None and all_finite(rows.output, self._dtype):
            for replica, _ in self._returned:
                breakers.succeeded(replica, now)
            return {}
        replicas = dict.fromkeys(replica for replica, _ in self._returned)
        bad = non_finite_rows(rows.output, self._dtype)  # [A]
        own = non_finite_rows(rows.hidden, self._dtype)  # [T]: what the router sent
        bad &= ~own[np.arange(len(bad)) // rows.top_k]
        for replica, doubted in self._doubted.items():
            if (doubted & ~bad).any():
                breakers.failed(replica, now, "it returned NaN or Inf for results that are finite", certain=True)
        source = np.full(len(bad), "", dtype=object)
        for replica, assignments in self._returned:
            source[assignments] = replica
        agreed = self._agreed = np.zeros(len(bad), dtype=np.int64) if self._agreed is None else self._agreed
        for replica in replicas:
            mine = bad & (source == replica)
            known = self._doubted.setdefault(replica, np.zeros(len(bad), dtype=bool))
            if breakers.closed(replica):
                agreed += mine & ~known
            known |= mine
            if not known.any():
                breakers.succeeded(replica, now)
        again = {replica: np.flatnonzero(bad & (agreed < 2) & (source == replica)) for replica in replicas}
        return {replica: assignments for replica, assignments in again.items() if len(assignments)}

    def accuse(self, assignments: Sequence[int], breakers: Breakers, now: float) -> None:
        """Blames the replicas that returned `assignments` non-finite, after no other holder could be asked."""
        for replica, doubted in self._doubted.items():
            if doubted[np.asarray(assignments)].any():
                why = "it returned NaN or Inf, and no other holder could be asked"
                breakers.failed(replica, now, why, certain=True)
