"""The sampling settings that a checkpoint's publisher recommends, in generation_config.json."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moiety.core.sampling_options import SamplingOptions
from moiety.model.checkpoint.side_files import GENERATION_FILE, read_side_file

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
        stated = read_side_file(Path(folder), GENERATION_FILE)

        def number(name: str) -> float | None:
            return None if stated.get(name) is None else float(stated[name])

        top_k, most = stated.get("top_k"), stated.get("max_new_tokens")
        return cls(
            temperature=number("temperature"),
            top_p=number("top_p"),
            top_k=None if top_k is None else max(0, int(top_k)),  # -1: all, as 0
            min_p=number("min_p"),
            repetition_penalty=number("repetition_penalty"),
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
