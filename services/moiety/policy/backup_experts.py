"""Decides which rows of overrun experts go to another expert: a pure function of the gate's scores and the overrun experts.

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
    """Replaces each `spared` [E] expert in `chosen` [T, K] by the token's best-scored expert that is not `overrun` [E].

    `scores` is [T, E]. `overrun` includes all `spared` experts, and overrun experts that must keep their rows.
    A token never gets an expert twice. If no other expert is left, the token keeps the spared one. -1 (no expert) stays.
    """
    result = chosen.copy()
    hit = (chosen >= 0) & spared[np.maximum(chosen, 0)]  # [T, K]
    tokens = np.flatnonzero(hit.any(axis=1))
    left = np.where(overrun, -np.inf, scores[tokens].astype(np.float64))
    for k in range(chosen.shape[1]):
        taken = chosen[tokens, k]
        left[np.flatnonzero(taken >= 0), taken[taken >= 0]] = -np.inf
    for k in range(chosen.shape[1]):
        rows = np.flatnonzero(hit[tokens, k])
        best = left[rows].argmax(axis=1)
        found = left[rows, best] > -np.inf
        rows, best = rows[found], best[found]
        result[tokens[rows], k] = best
        left[rows, best] = -np.inf
    return result
