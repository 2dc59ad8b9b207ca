"""Builds sequences and logits for sampler tests."""

from __future__ import annotations

from typing import Any

import torch

from moiety.core.sampling import Sampling
from moiety.errors import MoietyError
from moiety.router.sampling.sampler import Sampled, sample
from moiety.router.sequence.sequence import Sequence

EOS = 1


def sequence_of(
    prompt: list[int] | None = None, generated: list[int] | None = None, *, choice: int = 0, **options: Any
) -> Sequence:
    """Builds a sequence with the output `generated`; the default temperature is 1."""
    prompt, generated = prompt or [3, 4], generated or []
    sampling = Sampling(**{"max_tokens": 100, "temperature": 1.0, **options})
    return Sequence(
        request_id="r",
        tokens=[*prompt, *generated],
        prompt_tokens=len(prompt),
        sampling=sampling,
        stop_ids=sampling.ends([EOS]),
        emit=lambda _: None,
        choice=choice,
    )


def logits_of(seed: int, vocabulary: int = 50, rows: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Returns random logits [rows, vocabulary]."""
    return (3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))).to(dtype)


def sampled(logits: torch.Tensor, *sequences: Sequence) -> list[Sampled]:
    """Returns what `sample` gives; no row may fail."""
    results = sample(logits, sequences)
    for result in results:
        assert not isinstance(result, MoietyError), result
    return results  # type: ignore[return-value]


def one(logits: torch.Tensor, sequence: Sequence) -> Sampled:
    """Samples a single row."""
    return sampled(logits, sequence)[0]
