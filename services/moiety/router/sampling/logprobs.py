"""The model's own log probabilities: the log-softmax of its raw logits, before temperature, bounds and penalties."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moiety.core.sampling import TopLogprobs
from moiety.core.sampling_options import MAX_TOP_LOGPROBS

ROWS = 64  # prompt positions at a time: 40 MB at a vocabulary of 151,936


def sampled_logprobs(
    logits: torch.Tensor, tokens: Sequence[int], tops: Sequence[int]
) -> list[tuple[float, TopLogprobs | None]]:
    """Returns for each row of logits [n, V] the log probability of `tokens[row]`, and the `tops[row]` likeliest tokens.

    The likeliest tokens of a row are None where its `tops[row]` is 0.
    """
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(tokens, device=logprobs.device)[:, None])[:, 0].tolist()
    if not any(tops):
        return [(value, None) for value in chosen]
    # The same top-k for all, cut afterwards: the order of ties must not depend on what other requests ask for.
    best = logprobs.topk(min(MAX_TOP_LOGPROBS, logprobs.shape[1]), -1)
    values, ids = best.values.tolist(), best.indices.tolist()
    return [
        (value, TopLogprobs(tuple(ids[row][:top]), tuple(values[row][:top])) if top else None)
        for row, (value, top) in enumerate(zip(chosen, tops, strict=True))
    ]


@torch.inference_mode()
def prompt_logprobs(
    logits: torch.Tensor, following: Sequence[int], top: int = 0
) -> tuple[list[float], list[TopLogprobs]]:
    """Returns the log probabilities of prompt tokens `following` [n], from the logits [n, V] of the positions before them.

    With them come the `top` likeliest tokens of each position, if `top` is above 0.
    """
    scores, tops = list[float](), list[TopLogprobs]()
    for start in range(0, len(following), ROWS):
        logprobs = logits[start : start + ROWS].float().log_softmax(-1)
        ids = torch.tensor(following[start : start + ROWS], device=logprobs.device)
        scores += logprobs.gather(1, ids[:, None])[:, 0].tolist()
        if top:
            best = logprobs.topk(top, -1)
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            tops += [TopLogprobs(tuple(tokens), tuple(values)) for tokens, values in pairs]
    return scores, tops
