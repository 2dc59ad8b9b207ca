"""Log probabilities of the model itself: the log-softmax of its raw logits, before temperature, bounds and penalties."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moiety.core.sampling import TopLogprobs
from moiety.wire.sampling_params import MAX_TOP_LOGPROBS

ROWS = 64  # of a prompt at a time: 40 MB at a vocabulary of 151,936


def sampled_logprobs(
    logits: torch.Tensor, tokens: Sequence[int], tops: Sequence[int]
) -> list[tuple[float, TopLogprobs | None]]:
    """For logits [n, V]: the log probability of each row's token, and its `tops[row]` likeliest tokens (0: None)."""
    every = logits.float().log_softmax(-1)
    chosen = every.gather(1, torch.tensor(tokens, device=every.device)[:, None])[:, 0].tolist()
    if not any(tops):
        return [(value, None) for value in chosen]
    # Always the same number, cut afterwards: which of equals come first must not depend on what others ask for.
    best = every.topk(min(MAX_TOP_LOGPROBS, every.shape[1]), -1)
    values, ids = best.values.tolist(), best.indices.tolist()
    return [
        (value, TopLogprobs(tuple(ids[row][:top]), tuple(values[row][:top])) if top else None)
        for row, (value, top) in enumerate(zip(chosen, tops, strict=True))
    ]


@torch.inference_mode()
def prompt_logprobs(logits: torch.Tensor, following: Sequence[int]) -> list[float]:
    """The log probability of each prompt token, from the logits [n, V] of the positions before them; `following` [n]."""
    told: list[float] = []
    for start in range(0, len(following), ROWS):
        every = logits[start : start + ROWS].float().log_softmax(-1)
        ids = torch.tensor(following[start : start + ROWS], device=every.device)
        told += every.gather(1, ids[:, None])[:, 0].tolist()
    return told
