"""Changes logits before a token is picked from them, in vLLM's order:

logit bias -> repetition, frequency and presence penalties -> guide -> min_tokens -> a first token that the request forces.

Each stage runs once for the whole batch and changes only the rows whose own parameters need it.
"""

from __future__ import annotations

from collections import abc

import numpy as np
import torch

from moiety.errors import MoietyError
from moiety.router.sequence.guides import allowed_tokens
from moiety.router.sequence.sequence import Sequence


def changes(sequence: Sequence) -> bool:
    """Whether `process` may change the logits of this sequence's next token."""
    sampling = sequence.sampling
    return bool(
        sampling.logit_bias or sampling.penalised or sequence.guide or _too_short(sequence) or _begins(sequence)
    )


def process(scores: torch.Tensor, sequences: abc.Sequence[Sequence]) -> dict[int, MoietyError]:
    """Changes scores [n, V] (float32, contiguous) in place; returns the errors of rows whose guide failed."""
    if biased := [row for row, sequence in enumerate(sequences) if sequence.sampling.logit_bias]:
        _add_bias(scores, sequences, biased)
    if penalised := [row for row, sequence in enumerate(sequences) if sequence.sampling.penalised]:
        _penalise(scores, sequences, penalised)
    guided = [row for row, sequence in enumerate(sequences) if sequence.guide and not _begins(sequence)]
    failed = _follow_guides(scores, sequences, guided) if guided else {}
    if short := [row for row, sequence in enumerate(sequences) if not sequence.guide and _too_short(sequence)]:
        scores.view(-1)[_places(scores, short, [_ends(sequences[row]) for row in short])] = float("-inf")
    for row, sequence in enumerate(sequences):
        if (first := sequence.sampling.first_token_id) is not None and _begins(sequence):
            scores[row] = float("-inf")
            scores[row, first] = 0.0
    return failed


def _add_bias(scores: torch.Tensor, sequences: abc.Sequence[Sequence], rows: list[int]) -> None:
    biases = [sequences[row].sampling.logit_bias for row in rows]
    places = _places(scores, rows, [np.fromiter(bias, np.int64, len(bias)) for bias in biases])
    added = np.concatenate([np.fromiter(bias.values(), np.float32, len(bias)) for bias in biases])
    scores.view(-1)[places] += torch.from_numpy(added).to(scores.device)


def _penalise(scores: torch.Tensor, sequences: abc.Sequence[Sequence], rows: list[int]) -> None:
    """Applies the repetition penalty to tokens of prompt and output, frequency and presence penalties to tokens of the output.

    The repetition penalty is that of transformers' RepetitionPenaltyLogitsProcessor; the other two are OpenAI's.
    """
    counts = [sequences[row].counts for row in rows]
    for row, counted in zip(rows, counts, strict=True):
        counted.follow(sequences[row].tokens, sequences[row].prompt_tokens)
    sizes = [len(counted.ids) for counted in counts]

    def per_token(values: list[float]) -> torch.Tensor:
        return torch.from_numpy(np.repeat(np.asarray(values, np.float32), sizes)).to(scores.device)

    places = _places(scores, rows, [counted.ids for counted in counts])
    generated = torch.from_numpy(np.concatenate([counted.generated for counted in counts])).to(scores.device)
    repetition = per_token([sequences[row].sampling.repetition_penalty for row in rows])
    frequency = per_token([sequences[row].sampling.frequency_penalty for row in rows])
    presence = per_token([sequences[row].sampling.presence_penalty for row in rows])
    values = scores.view(-1)[places]
    values = torch.where(values > 0, values / repetition, values * repetition)
    scores.view(-1)[places] = values - frequency * generated - presence * (generated > 0)


def _follow_guides(scores: torch.Tensor, sequences: abc.Sequence[Sequence], rows: list[int]) -> dict[int, MoietyError]:
    """Masks the tokens that a row's guide forbids; returns the errors of rows whose guide failed.

    In an output shorter than min_tokens, also masks the tokens that end it, unless the guide allows no other token.
    """
    allowed, failed = allowed_tokens([sequences[row].following_guide() for row in rows], scores.shape[1])
    for index, row in enumerate(rows):
        if _too_short(sequences[row]):
            without_ends = allowed[index].copy()
            without_ends[_ends(sequences[row])] = 0
            if without_ends.any():
                allowed[index] = without_ends
    scores[rows] += torch.from_numpy(allowed).to(scores.device).float().log_()  # log 1 = 0, log 0 = -inf
    return {rows[index]: error for index, error in failed.items()}


def _begins(sequence: Sequence) -> bool:
    """Whether the next token is the first of the output, and the request forces it (`first_token_id`)."""
    return sequence.sampling.first_token_id is not None and sequence.generated == 0


def _too_short(sequence: Sequence) -> bool:
    return sequence.generated < sequence.sampling.min_tokens


def _ends(sequence: Sequence) -> np.ndarray:
    return np.fromiter(sequence.stop_ids, np.int64, len(sequence.stop_ids))


def _places(scores: torch.Tensor, rows: list[int], ids: list[np.ndarray]) -> torch.Tensor:
    """Returns the indices in the flattened scores of tokens `ids[i]` in row `rows[i]`. Raises IndexError on an unknown id."""
    vocabulary = scores.shape[1]
    if any(row_ids.size and int(row_ids.max()) >= vocabulary for row_ids in ids):
        raise IndexError(f"token ids must be below {vocabulary}, the model's vocabulary")
    flat = np.concatenate([row * vocabulary + row_ids for row, row_ids in zip(rows, ids, strict=True)])
    return torch.from_numpy(flat).to(scores.device)
