"""Computes serving speeds from the arrival times of tokens, the same way for every system that is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

from moiety.bench.report import percentile


@dataclass(frozen=True, slots=True)
class Speeds:
    """The speeds of one run of several streams at once."""

    decode_tokens_per_s: float  # from the time when every stream has its first token to the last token of all streams
    itl_p50_ms: float  # gaps between the tokens of a stream, over all streams
    itl_p99_ms: float
    ttft_p50_ms: float  # from the common start to a stream's first token
    prefill_tokens_per_s: float  # all prompt tokens, from the common start until every stream has its first token


def speeds(began: float, arrivals: Sequence[Sequence[float]], prompt_tokens: int) -> Speeds:
    """Computes the speeds of one run of several streams that start together at `began`.

    `arrivals` has the token times of each stream, in seconds on the clock of `began`. A stream must have at least two
    tokens. `prompt_tokens` is the length of one prompt.
    """
    firsts = [stream[0] for stream in arrivals]
    decoding, ended = max(firsts), max(stream[-1] for stream in arrivals)
    decoded = sum(time > decoding for stream in arrivals for time in stream)
    gaps = [later - earlier for stream in arrivals for earlier, later in pairwise(stream)]
    return Speeds(
        decode_tokens_per_s=_rate(decoded, ended - decoding),
        itl_p50_ms=percentile(gaps, 50) * 1000,
        itl_p99_ms=percentile(gaps, 99) * 1000,
        ttft_p50_ms=(percentile(firsts, 50) - began) * 1000,
        prefill_tokens_per_s=_rate(prompt_tokens * len(arrivals), decoding - began),
    )


def median(runs: Sequence[Speeds]) -> Speeds:
    """Returns, for each field of Speeds, the median of that field over the runs."""
    return Speeds(*(percentile([getattr(run, field.name) for run in runs], 50) for field in fields(Speeds)))


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
