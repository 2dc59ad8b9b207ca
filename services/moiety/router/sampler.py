"""Picks tokens from logits. Randomness is counter-based: (seed, choice, position) decide, whatever else runs or was lost."""

from __future__ import annotations

import numpy as np
import torch

from moiety.core import Sampling


def sample(logits: torch.Tensor, sampling: Sampling, position: int, choice: int = 0) -> tuple[int, float]:
    """(token id, its log probability) from logits [V] in any float dtype; `position` counts generated tokens."""
    scores = logits.float()
    if sampling.temperature == 0.0:
        token = int(scores.argmax())
        return token, float(scores.log_softmax(-1)[token]) if sampling.logprobs else 0.0
    scores = (scores - scores.max()) / sampling.temperature  # shifted: a tiny temperature must not make them infinite
    if 0 < sampling.top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(sampling.top_k).values[-1], float("-inf"))
    ordered, ids = scores.sort(descending=True, stable=True)
    probabilities = ordered.softmax(-1)
    cumulative = probabilities.cumsum(-1)
    if sampling.top_p < 1.0:  # the fewest tokens that reach top_p, the first always among them
        kept = cumulative - probabilities < sampling.top_p
        probabilities = probabilities * kept
        cumulative = probabilities.cumsum(-1)
    target = uniform(sampling.seed, position, choice) * float(cumulative[-1])
    index = min(int(torch.searchsorted(cumulative, target, right=True)), int((probabilities > 0).sum()) - 1)
    token = int(ids[index])
    return token, float(logits.float().log_softmax(-1)[token]) if sampling.logprobs else 0.0


def uniform(seed: int, position: int, choice: int = 0) -> float:
    """In [0, 1): a pure function of its arguments (Philox4x64, Salmon et al. 2011)."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=[position, choice, 0, 0])).random())
