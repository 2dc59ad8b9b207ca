"""The sampling settings that a checkpoint's publisher recommends, in generation_config.json."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moiety.core.sampling_options import MAX_REPETITION_PENALTY, MAX_TEMPERATURE, SamplingOptions
from moiety.errors import CheckpointError
from moiety.model.checkpoint.checkpoint import read_json

GENERATION_FILE = "generation_config.json"
OPENAI_TEMPERATURE = 1.0


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What a request that leaves these settings out gets; None: the publisher says nothing.

    Units and meanings are those of `Sampling`; `top_k` 0 means the whole vocabulary, and `max_new_tokens` counts the output.

    As in vLLM's `--generation-config auto`, `do_sample` plays no role: a client that wants greedy output asks for
    temperature 0.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None

    @classmethod
    def open(cls, folder: str | Path) -> GenerationDefaults:
        """Reads them from a checkpoint folder; all are None where it has no such file.

        Raises CheckpointError that names file, field, value and bound.
        """
        file = Path(folder, GENERATION_FILE)
        stated = read_json(file) if file.is_file() else {}

        def checked(name: str, holds: Callable[[float], bool], bound: str) -> float | None:
            value = stated.get(name)
            if value is None:
                return None
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number or not holds(value):
                raise CheckpointError(f"{file}: {name} = {value!r}: must be {bound}")
            return float(value)

        top_k = checked("top_k", lambda k: k == int(k) and k >= -1, "an integer of at least -1")  # -1: all, as 0
        most = checked("max_new_tokens", lambda count: count == int(count) and count >= 1, "an integer of at least 1")
        return cls(
            temperature=checked(
                "temperature", lambda value: 0 <= value <= MAX_TEMPERATURE, f"0 to {MAX_TEMPERATURE:g}"
            ),
            top_p=checked("top_p", lambda value: 0 < value <= 1, "above 0 and at most 1"),
            top_k=None if top_k is None else max(0, int(top_k)),
            min_p=checked("min_p", lambda value: 0 <= value <= 1, "from 0 to 1"),
            repetition_penalty=checked(
                "repetition_penalty",
                lambda value: 0 < value <= MAX_REPETITION_PENALTY,
                f"above 0, up to {MAX_REPETITION_PENALTY:g}",
            ),
            max_new_tokens=None if most is None else int(most),
        )

    def filled_in(self, options: SamplingOptions, default_max_tokens: int | None = None) -> SamplingOptions:
        """Returns `options` with these defaults where a client left a value out, and else those of OpenAI's API.

        `default_max_tokens`: where the publisher says nothing; None: all that the context has left.
        """
        recommended: dict[str, Any] = {
            "temperature": OPENAI_TEMPERATURE if self.temperature is None else self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
        }
        left_out = {name: value for name, value in recommended.items() if getattr(options, name) is None}
        most = default_max_tokens if self.max_new_tokens is None else self.max_new_tokens
        return replace(options, default_max_tokens=most, **left_out)
