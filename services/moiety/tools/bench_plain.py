"""The baseline of `moiety bench serve`: plain transformers, one batch in this process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from moiety.model.architecture import quiet_transformers


class PlainTransformers:
    """A checkpoint as `AutoModelForCausalLM` loads it, experts implementation and all. Blocking: use from a thread."""

    def __init__(self, checkpoint: str, dtype: torch.dtype, threads: int):
        """Loads the whole model; `threads` are for its matrix products."""
        from transformers import AutoModelForCausalLM

        self.threads = threads
        with quiet_transformers():
            self._model: Any = AutoModelForCausalLM.from_pretrained(
                checkpoint, dtype=dtype, local_files_only=True
            ).eval()
        self._model.generation_config.eos_token_id = None  # everyone generates the same number of tokens
        self.implementation: str = self._model.config._experts_implementation

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[float, list[list[float]]]:
        """Greedy tokens for equally long prompts: (start, each prompt's token times), by `time.perf_counter`."""
        others = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        clock = _Clock()
        ids = torch.tensor(prompts)
        try:
            began = time.perf_counter()
            self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
                streamer=clock,
            )
        finally:
            torch.set_num_threads(others)
        return began, [clock.times[1:] for _ in prompts]  # the first is the prompt itself


class _Clock:
    """A transformers streamer that only notes when tokens come, one for every prompt of the batch at once."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _tokens: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""
