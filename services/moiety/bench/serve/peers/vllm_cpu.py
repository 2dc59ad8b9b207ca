"""Runs vLLM's CPU build through LLMEngine. As in `vllm serve`, the engine is in a process of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

Arrivals = tuple[float, list[list[float]]]


def load(
    checkpoint: str, dtype: str, threads: int, slots: int, context: int, scratch: str
) -> tuple[str, Callable[[Sequence[Sequence[int]], int], Arrivals], Callable[[], None]]:
    """Starts the engine on the first `threads` cores, with a KV cache of 4 GiB, unless VLLM_* variables say otherwise."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
    os.environ.setdefault("VLLM_CACHE_ROOT", scratch)
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import vllm
    from vllm import EngineArgs, SamplingParams
    from vllm.v1.engine.llm_engine import LLMEngine

    engine: Any = LLMEngine.from_engine_args(
        EngineArgs(
            model=checkpoint,
            dtype=dtype,
            max_model_len=context,
            max_num_seqs=slots,
            enable_prefix_caching=False,
            disable_log_stats=True,
        )
    )
    requests = 0

    def run(prompts: Sequence[Sequence[int]], new_tokens: int) -> Arrivals:
        nonlocal requests
        sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        times: dict[str, list[float]] = {}
        began = time.perf_counter()
        for prompt in prompts:
            requests += 1
            times[str(requests)] = []
            engine.add_request(str(requests), {"prompt_token_ids": list(prompt)}, sampling)
        while engine.has_unfinished_requests():
            for output in engine.step():
                arrived = times[output.request_id]
                arrived += [time.perf_counter()] * (len(output.outputs[0].token_ids) - len(arrived))
        return began, list(times.values())

    return f"vLLM {vllm.__version__} CPU", run, engine.engine_core.shutdown
