"""Samples from a step's logits and builds the events that its requests receive."""

from __future__ import annotations

import logging
from itertools import islice

import torch

from moiety.core.sampling import FinishReason
from moiety.errors import MoietyError
from moiety.router.sampling.logprobs import prompt_logprobs
from moiety.router.sampling.sampler import Sampled, sample
from moiety.router.sequence.drafts import accepted
from moiety.router.sequence.sequence import Emitted, Sequence
from moiety.router.sequence.step_plan import StepPlan

_log = logging.getLogger(__name__)


def emissions(plan: StepPlan, logits: torch.Tensor) -> list[tuple[Sequence, Emitted]]:
    """Samples for each sequence whose last token was computed, and returns the events.

    A failure to sample becomes the event of that sequence only.
    """
    failed = _score_prompts(plan, logits)
    choices = [choice for choice in _choices(plan) if choice[1] not in failed]
    failures = [(sequence, Emitted(error=error)) for sequence, error in failed.items()]
    if not choices:
        return failures
    rows = [row for own_rows, _, _ in choices for row in own_rows]
    prefixes = [
        sequence.with_drafts(drafts[:n]) for own_rows, sequence, drafts in choices for n in range(len(own_rows))
    ]
    results = sample(logits if rows == list(range(len(logits))) else logits[rows], prefixes)
    emitted = map(_emitted, prefixes, results)
    return failures + [
        (sequence, event)
        for own_rows, sequence, drafts in choices
        for event in _up_to_wrong_draft(drafts, list(islice(emitted, len(own_rows))))
    ]


def _score_prompts(plan: StepPlan, logits: torch.Tensor) -> dict[Sequence, MoietyError]:
    """Computes requested log probabilities of prompt tokens; they are sent with the first token. Returns what failed."""
    failed: dict[Sequence, MoietyError] = {}
    for item, rows in plan.rows():
        sequence = item.sequence
        if sequence.needs_prompt_logits:
            past = sequence.computed
            following = sequence.tokens[past + 1 : past + item.count + 1]  # no token follows the last one
            try:
                prompt_logits = logits[rows.start : rows.start + len(following)]
                scores, tops = prompt_logprobs(prompt_logits, following, sequence.sampling.top_logprobs)
                sequence.prompt_logprobs += scores
                sequence.prompt_top_logprobs += tops
            except Exception:
                _log.exception("the log probabilities of the prompt of request %s failed", sequence.request_id)
                failed[sequence] = MoietyError("the prompt's log probabilities failed; the router's log says why")
    return failed


def _emitted(sequence: Sequence, result: Sampled | MoietyError) -> Emitted:
    """Returns the event for a sampled token, or for the failure to sample it."""
    if isinstance(result, MoietyError):
        return Emitted(error=result, choice=sequence.choice)
    prompt_scores, prompt_tops = tuple(sequence.prompt_logprobs), tuple(sequence.prompt_top_logprobs)
    if prompt_scores:
        sequence.prompt_logprobs, sequence.prompt_top_logprobs = [], []
    return Emitted(
        (result.token,),
        () if result.logprob is None else (result.logprob,),
        _finish(sequence, result.token),
        choice=sequence.choice,
        top_logprobs=() if result.top is None else (result.top,),
        prompt_logprobs=prompt_scores,
        prompt_top_logprobs=prompt_tops,
    )


def _finish(sequence: Sequence, token: int) -> FinishReason | None:
    """Returns why the sequence ends with `token`; None if it goes on."""
    if token in sequence.stop_ids:
        return FinishReason.STOP
    return FinishReason.LENGTH if sequence.generated + 1 >= sequence.sampling.max_tokens else None


def _up_to_wrong_draft(drafts: tuple[int, ...], events: list[Emitted]) -> list[Emitted]:
    """Returns `events` up to and including the first one that ends the output or whose token is not the next draft.

    `events[n]` was sampled after `drafts[:n]`.
    """
    ended = next((at for at, event in enumerate(events) if event.finish or event.error), len(events))
    return events[: accepted(drafts, [event.token_ids[0] for event in events[:ended]]) + 1]


def _choices(plan: StepPlan) -> list[tuple[range, Sequence, tuple[int, ...]]]:
    """Returns what to sample: (rows of the logits, sequence, drafts) for each choice.

    All choices of a request whose prompt is complete in this step sample from the same row.
    """
    return [
        (rows[-1 - len(item.drafts) :], sequence, item.drafts)
        for item, rows in plan.rows()
        if item.samples
        for sequence in (item.sequence, *item.sequence.siblings)
    ]
