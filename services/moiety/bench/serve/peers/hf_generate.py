"""Runs transformers' `generate`: greedy, all prompts in one batch, with transformers' default experts implementation."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

Arrivals = tuple[float, list[list[float]]]


def load(
    checkpoint: str, dtype: str, threads: int, slots: int, context: int, scratch: str
) -> tuple[str, Callable[[Sequence[Sequence[int]], int], Arrivals], Callable[[], None]]:
    """Loads the whole model. Does not use `slots`, `context` and `scratch`."""
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, local_files_only=True).eval()
    model.generation_config.eos_token_id = None  # so that every system generates the same number of tokens
    experts = getattr(model.config, "_experts_implementation", None) or "eager"

    @torch.inference_mode()
    def run(prompts: Sequence[Sequence[int]], new_tokens: int) -> Arrivals:
        clock, ids = _Clock(), torch.tensor(prompts)
        began = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=clock,
        )
        return began, [clock.times[1:] for _ in prompts]  # the streamer's first call is for the prompt itself

    return f"transformers {version('transformers')} generate, {experts}", run, lambda: None


class _Clock:
    """A transformers streamer that only records call times. Each call after the first brings a token for every prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _tokens: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Does nothing: no token is buffered."""
