"""The sampling settings of one request, and how its generation ends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a generation ended. STOP: at an end-of-sequence token, a stop token or a stop string. LENGTH: at max_tokens."""

    STOP = "stop"
    LENGTH = "length"


class GuideKind(StrEnum):
    """The language in which a `Guide` is written; the values are named as in generation.proto."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    GRAMMAR = "grammar"


@dataclass(frozen=True, slots=True)
class Guide:
    """A constraint that an output must match as a whole, not only in part."""

    kind: GuideKind
    text: str


@dataclass(frozen=True, slots=True)
class TopLogprobs:
    """The most likely tokens of one position, most likely first."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Sampling:
    """The sampling settings of one request. generation.proto explains them; `sampling_options.py` checks their bounds."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0 = the whole vocabulary
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    ignore_eos: bool = False
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    logprobs: bool = False
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    n: int = 1
    guide: Guide | None = None
    first_token_id: int | None = None  # forces the first token of the output, whatever the logits

    @property
    def penalised(self) -> bool:
        """Whether a penalty makes the logits of the next token depend on earlier tokens."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def ends(self, eos: Iterable[int]) -> frozenset[int]:
        """Returns the tokens that end an output of a model whose end-of-sequence ids are `eos`."""
        return frozenset(self.stop_token_ids) | frozenset(() if self.ignore_eos else eos)
