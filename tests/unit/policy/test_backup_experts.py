"""Rows of overrun experts go to the next-best expert; nothing else changes."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moiety.policy.backup_experts import backups


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 8), st.integers(0, 2**32 - 1))
def test_each_row_of_an_overrun_expert_gets_the_best_that_is_left(
    tokens: int, top_k: int, overrun_count: int, seed: int
) -> None:
    """Agrees with plain loops: slot by slot, the best score that is neither overrun nor already the token's."""
    generator = np.random.default_rng(seed)
    scores = generator.permuted(np.arange(tokens * 8.0).reshape(tokens, 8), axis=1)
    chosen = np.argsort(-scores, axis=1)[:, :top_k].astype(np.int64)
    chosen[generator.random(chosen.shape) < 0.1] = -1
    overrun = np.zeros(8, dtype=bool)
    overrun[generator.permutation(8)[:overrun_count]] = True
    spared = overrun & (generator.random(8) < 0.7)  # the others' rows wait

    expected = chosen.copy()
    for token in range(tokens):
        taken = set(chosen[token].tolist())
        for k in range(top_k):
            if (expert := chosen[token, k]) >= 0 and spared[expert]:
                left = [e for e in np.argsort(-scores[token]).tolist() if not overrun[e] and e not in taken]
                if left:
                    expected[token, k] = left[0]
                    taken.add(left[0])
    assert backups(chosen, scores, spared, overrun).tolist() == expected.tolist()


def test_where_all_are_overrun_rows_stay() -> None:
    """If every expert is overrun, no row is rerouted."""
    chosen = np.array([[0, 1]])
    assert backups(chosen, np.array([[3.0, 2.0, 1.0]]), np.ones(3, dtype=bool), np.ones(3, dtype=bool)).tolist() == [
        [0, 1]
    ]
