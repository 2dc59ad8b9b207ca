"""From the logits of a step to what its requests hear of it."""

from __future__ import annotations

from itertools import islice

import torch

from moiety.core.sampling import FinishReason
from moiety.errors import MoietyError
from moiety.router.sampling.logprobs import prompt_logprobs
from moiety.router.sampling.sampler import Sampled, sample
from moiety.router.sequence.drafts import accepted
from moiety.router.sequence.sequence import Emitted, Sequence
from moiety.router.sequence.step_plan import StepPlan


def emissions(plan: StepPlan, logits: torch.Tensor) -> list[tuple[Sequence, Emitted]]:
    """What each sequence whose last token was computed has won; a failure to sample is that request's own."""
    _score_prompts(plan, logits)
    choices = _choices(plan)
    if not choices:
        return []
    rows = [row for of_choice, _, _ in choices for row in of_choice]
    seen = [sequence.ahead(drafts[:n]) for of_choice, sequence, drafts in choices for n in range(len(of_choice))]
    results = sample(logits if rows == list(range(len(logits))) else logits[rows], seen)
    emitted = map(_emitted, seen, results)
    return [
        (sequence, one)
        for of_choice, sequence, drafts in choices
        for one in _up_to_a_wrong_draft(drafts, list(islice(emitted, len(of_choice))))
    ]


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


def _up_to_a_wrong_draft(drafts: tuple[int, ...], emitted: list[Emitted]) -> list[Emitted]:
    """Of what was sampled behind 0, 1, 2… drafts: all that stands behind right ones only, and behind no end."""
    ended = next((at for at, one in enumerate(emitted) if one.finish or one.error), len(emitted))
    return emitted[: accepted(drafts, [one.token_ids[0] for one in emitted[:ended]]) + 1]


def _choices(plan: StepPlan) -> list[tuple[range, Sequence, tuple[int, ...]]]:
    """(rows of the logits, sequence, its drafts) of all that are sampled: a prompt's last row once for each choice."""
    return [
        (rows[-1 - len(item.drafts) :], sequence, item.drafts)
        for item, rows in plan.rows()
        if item.samples
        for sequence in (item.sequence, *item.sequence.siblings)
    ]
