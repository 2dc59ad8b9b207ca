"""Which rows go to another expert while theirs is overrun: a pure function of scores and of who is overrun.

Legend: T tokens, K experts per token, E experts.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def backups(
    chosen: npt.NDArray[np.int64],
    scores: npt.NDArray[np.floating],
    spared: npt.NDArray[np.bool_],
    overrun: npt.NDArray[np.bool_],
) -> npt.NDArray[np.int64]:
    """`chosen` [T, K] with the experts of `spared` [E] replaced by the best by `scores` [T, E] that are not `overrun` [E].

    `overrun`: these and those whose rows may only wait, and who are no help to others either.
    A token never gets an expert twice; where no other is left, it keeps its own. -1 (no expert) stays.
    """
    result = chosen.copy()
    hit = (chosen >= 0) & spared[np.maximum(chosen, 0)]  # [T, K]
    tokens = np.flatnonzero(hit.any(axis=1))
    left = np.where(overrun, -np.inf, scores[tokens].astype(np.float64))
    for k in range(chosen.shape[1]):
        own = chosen[tokens, k]
        left[np.flatnonzero(own >= 0), own[own >= 0]] = -np.inf
    for k in range(chosen.shape[1]):
        rows = np.flatnonzero(hit[tokens, k])
        best = left[rows].argmax(axis=1)
        there = left[rows, best] > -np.inf
        rows, best = rows[there], best[there]
        result[tokens[rows], k] = best
        left[rows, best] = -np.inf
    return result
