"""Runs transformers' continuous batching, with a cache sized for the workload and without sharing prefixes."""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.utils import logging

Arrivals = tuple[float, list[list[float]]]
PAGE = 16
BATCH_TOKENS = 512  # per step; the attention masks are dense and grow with it


def load(
    checkpoint: str, dtype: str, threads: int, slots: int, context: int, scratch: str
) -> tuple[str, Callable[[Sequence[Sequence[int]], int], Arrivals], Callable[[], None]]:
    """Loads the model and starts the manager's thread. Does not use `scratch`."""
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    model: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=dtype, attn_implementation="sdpa", local_files_only=True
    ).eval()
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(do_sample=False, max_new_tokens=context, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=slots * (context // PAGE + 2),
            max_batch_tokens=max(BATCH_TOKENS, slots),
            max_requests_per_batch=slots,
            allow_block_sharing=False,
        ),
    )
    manager.start()
    atexit.register(manager.stop, block=True, hard_stop=True)

    def run(prompts: Sequence[Sequence[int]], new_tokens: int) -> Arrivals:
        times: dict[str, list[float]] = {}
        began = time.perf_counter()
        for prompt in prompts:
            request = manager.add_request(list(prompt), max_new_tokens=new_tokens, streaming=True, eos_token_id=-1)
            if request is None:
                raise RuntimeError("the manager no longer accepts requests")
            times[request] = []
        left = len(prompts)
        while left:
            output = manager.get_result(timeout=1.0)
            if output is None:
                if not manager.is_running():
                    raise RuntimeError("the manager's thread has ended")
                continue
            if output.error:
                raise RuntimeError(output.error)
            arrived = times[output.request_id]
            # A message carries all tokens so far, and sometimes no new one.
            arrived += [time.perf_counter()] * (len(output.generated_tokens) - len(arrived))
            left -= output.is_finished()
        return began, list(times.values())

    return (
        f"transformers {version('transformers')} continuous batching",
        run,
        lambda: manager.stop(block=True, timeout=5.0, hard_stop=True),
    )
