"""What a client asks of sampling, and the bounds of each value. Every API checks requests here, and so does the router."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import isfinite

from moiety.core.sampling import Guide, Sampling
from moiety.errors import InvalidRequest

DEFAULT_MAX_TOKENS = 128
MAX_TEMPERATURE = 10.0
MAX_PENALTY = 2.0  # presence and frequency penalty, absolute value
MAX_REPETITION_PENALTY = 10.0
MAX_BIAS, MAX_BIASES = 100.0, 1024
MAX_TOP_LOGPROBS = 20
MAX_STOPS, MAX_STOP_CHARACTERS = 16, 256
MAX_STOP_IDS = 64
MAX_CHOICES = 16
MAX_GUIDE_CHARACTERS = 1 << 16


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """Sampling settings as a client gives them. None: the client leaves the value to the default. See generation.proto."""

    max_tokens: int | None = None
    default_max_tokens: int | None = DEFAULT_MAX_TOKENS  # or what the context has left if that is less; None: all of it
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    ignore_eos: bool = False
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logprobs: bool = False
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    n: int | None = None
    guide: Guide | None = None
    first_token: int | str | None = None  # its id, or its text

    def resolved(
        self, prompt_tokens: int, vocabulary: int, max_context: int, first_token_id: int | None = None
    ) -> Sampling:
        """Returns the settings with defaults filled in. Raises InvalidRequest that names the field and its bound.

        `prompt_tokens`: how many tokens the context holds before the output. For an encoder-decoder that is 1, the
        decoder's first token. `first_token_id`: the id of `first_token` where that is a text.
        """
        available = max_context - prompt_tokens
        default = available if self.default_max_tokens is None else min(self.default_max_tokens, available)
        max_tokens = self.max_tokens if self.max_tokens is not None else default
        if not 1 <= max_tokens <= available:
            bound = f"1 to {available}: {prompt_tokens} prompt tokens are in a context of {max_context}"
            raise InvalidRequest("sampling.max_tokens", max_tokens, bound)
        top_k = self.top_k or 0
        _check("top_k", top_k, 0 <= top_k <= vocabulary, f"0 (all) to the vocabulary of {vocabulary}")
        bound = f"0 to max_tokens, {max_tokens}"
        _check("min_tokens", self.min_tokens, 0 <= self.min_tokens <= max_tokens, bound)
        choices = self.n if self.n is not None else 1
        _check("n", choices, 1 <= choices <= MAX_CHOICES, f"1 to {MAX_CHOICES}")
        self._check_bias(vocabulary)
        self._check_stops(vocabulary)
        self._check_logprobs(vocabulary)
        self._check_guide()
        if isinstance(self.first_token, int):
            first_token_id = self.first_token
        if first_token_id is not None:
            _check_ids("first_token_id", (first_token_id,), vocabulary)
        bound = f"above 0, up to {MAX_REPETITION_PENALTY:g}"
        temperature_bound = f"0 (greedy) to {MAX_TEMPERATURE:g}"
        return Sampling(
            max_tokens=max_tokens,
            temperature=_number("temperature", self.temperature, 0.0, 0.0, MAX_TEMPERATURE, temperature_bound),
            top_p=_number("top_p", self.top_p, 1.0, 0.0, 1.0, "above 0, up to 1", above=True),
            top_k=top_k,
            min_p=_number("min_p", self.min_p, 0.0, 0.0, 1.0, "0 to 1"),
            seed=self.seed if self.seed is not None else secrets.randbits(63),
            repetition_penalty=_number(
                "repetition_penalty", self.repetition_penalty, 1.0, 0.0, MAX_REPETITION_PENALTY, bound, above=True
            ),
            presence_penalty=_penalty("presence_penalty", self.presence_penalty),
            frequency_penalty=_penalty("frequency_penalty", self.frequency_penalty),
            logit_bias=self.logit_bias,
            ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens,
            stop_token_ids=self.stop_token_ids,
            logprobs=self.logprobs,
            top_logprobs=self.top_logprobs,
            prompt_logprobs=self.prompt_logprobs,
            n=choices,
            guide=self.guide,
            first_token_id=first_token_id,
        )

    def _check_bias(self, vocabulary: int) -> None:
        count = len(self.logit_bias)
        _check("logit_bias", f"{count} entries", count <= MAX_BIASES, f"at most {MAX_BIASES} entries")
        _check_ids("logit_bias", self.logit_bias, vocabulary)
        for token, bias in self.logit_bias.items():
            good = isfinite(bias) and abs(bias) <= MAX_BIAS
            _check(f"logit_bias[{token}]", bias, good, f"{-MAX_BIAS:g} to {MAX_BIAS:g}")

    def _check_stops(self, vocabulary: int) -> None:
        count = len(self.stop)
        _check("stop", f"{count} strings", count <= MAX_STOPS, f"at most {MAX_STOPS} strings")
        for text in self.stop:
            _check("stop", text, 1 <= len(text) <= MAX_STOP_CHARACTERS, f"1 to {MAX_STOP_CHARACTERS} characters each")
        count = len(self.stop_token_ids)
        _check("stop_token_ids", f"{count} ids", count <= MAX_STOP_IDS, f"at most {MAX_STOP_IDS} ids")
        _check_ids("stop_token_ids", self.stop_token_ids, vocabulary)

    def _check_logprobs(self, vocabulary: int) -> None:
        most = min(MAX_TOP_LOGPROBS, vocabulary)
        _check("top_logprobs", self.top_logprobs, 0 <= self.top_logprobs <= most, f"0 to {most}")
        _check("top_logprobs", self.top_logprobs, self.logprobs or not self.top_logprobs, "0 without logprobs")

    def _check_guide(self) -> None:
        if (guide := self.guide) is None:
            return
        bound = f"1 to {MAX_GUIDE_CHARACTERS} characters"
        _check(f"guide.{guide.kind}", guide.text, 1 <= len(guide.text) <= MAX_GUIDE_CHARACTERS, bound)
        _check("ignore_eos", True, not self.ignore_eos, "false with a guide: only the end of sequence ends its output")


def _check(name: str, value: object, holds: bool, bound: str) -> None:
    if not holds:
        raise InvalidRequest(f"sampling.{name}", value, bound)


def _number(
    name: str, value: float | None, default: float, low: float, high: float, bound: str, *, above: bool = False
) -> float:
    """Returns `value`, or `default` for None. Raises InvalidRequest unless it lies from `low` to `high`, both included.

    `above`: `low` is excluded.
    """
    if value is None:
        return default
    _check(name, value, isfinite(value) and low <= value <= high and not (above and value == low), bound)
    return value


def _penalty(name: str, value: float | None) -> float:
    return _number(name, value, 0.0, -MAX_PENALTY, MAX_PENALTY, f"{-MAX_PENALTY:g} to {MAX_PENALTY:g}")


def _check_ids(name: str, ids: Iterable[int], vocabulary: int) -> None:
    worst = max(ids, default=0)
    _check(
        name, worst, worst < vocabulary and min(ids, default=0) >= 0, f"token ids below the vocabulary of {vocabulary}"
    )
