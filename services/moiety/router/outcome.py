"""From the logits of a step to what its requests hear of it."""

from __future__ import annotations

import torch

from moiety.core import FinishReason
from moiety.errors import MoietyError
from moiety.router.logprobs import prompt_logprobs
from moiety.router.plan import StepPlan
from moiety.router.sampler import Sampled, sample
from moiety.router.sequence import Emitted, Sequence


def outcome(plan: StepPlan, logits: torch.Tensor) -> list[tuple[Sequence, Emitted]]:
    """A token for each sequence whose last one was computed; a failure to sample is that request's own."""
    _score_prompts(plan, logits)
    choices = _choices(plan)
    rows, sequences = [row for row, _ in choices], [sequence for _, sequence in choices]
    if not choices:
        return []
    results = sample(logits if rows == list(range(len(logits))) else logits[rows], sequences)
    return [(sequence, _emitted(sequence, result)) for sequence, result in zip(sequences, results, strict=True)]


def _score_prompts(plan: StepPlan, logits: torch.Tensor) -> None:
    """Log probabilities of prompt tokens, where asked for; they go out with the first token."""
    for item, rows in plan.rows():
        sequence = item.sequence
        if sequence.scores_prompt:
            past = sequence.computed
            following = sequence.tokens[past + 1 : past + item.count + 1]  # the last token of all has none
            of_prompt = logits[rows.start : rows.start + len(following)]
            sequence.prompt_logprobs += prompt_logprobs(of_prompt, following)


def _emitted(sequence: Sequence, result: Sampled | MoietyError) -> Emitted:
    """What the request hears of its sampled token."""
    if isinstance(result, MoietyError):
        return Emitted(error=result, choice=sequence.choice)
    told, sequence.prompt_logprobs = tuple(sequence.prompt_logprobs), []
    return Emitted(
        (result.token,),
        () if result.logprob is None else (result.logprob,),
        _finish(sequence, result.token),
        choice=sequence.choice,
        top_logprobs=() if result.top is None else (result.top,),
        prompt_logprobs=told,
    )


def _finish(sequence: Sequence, token: int) -> FinishReason | None:
    """Whether `token` is the sequence's last."""
    if token in sequence.stop_ids:
        return FinishReason.STOP
    return FinishReason.LENGTH if sequence.generated + 1 >= sequence.sampling.max_tokens else None


def _choices(plan: StepPlan) -> list[tuple[int, Sequence]]:
    """(row of the logits, sequence) of all that are sampled: a prompt's last row once for each choice of it."""
    return [
        (rows[-1], sequence)
        for item, rows in plan.rows()
        if item.samples
        for sequence in (item.sequence, *item.sequence.siblings)
    ]
