"""Runs llama.cpp through llama-cpp-python. Like llama.cpp's server, decodes all streams in one batch per step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from gguf_qwen3moe import write_gguf

Arrivals = tuple[float, list[list[float]]]
BATCH_TOKENS = 512  # per prefill step; llama.cpp's own default


def load(
    checkpoint: str, dtype: str, threads: int, slots: int, context: int, scratch: str
) -> tuple[str, Callable[[Sequence[Sequence[int]], int], Arrivals], Callable[[], None]]:
    """Writes the checkpoint as GGUF to `scratch` unless it is there, loads the GGUF, and makes a context for all streams."""
    if dtype != "bfloat16":
        raise ValueError(f"dtype {dtype}: the GGUF is written in bfloat16 only")
    file = Path(scratch) / "model.gguf"
    if not file.exists():
        write_gguf(Path(checkpoint), file)
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp could not load {file}")
    options = llama_cpp.llama_context_default_params()
    options.n_ctx = slots * context
    options.n_seq_max = slots
    options.n_batch = max(BATCH_TOKENS, slots)
    options.n_ubatch = max(BATCH_TOKENS, slots)
    options.n_threads = options.n_threads_batch = threads
    engine = llama_cpp.llama_init_from_model(model, options)
    if not engine:
        raise RuntimeError("llama.cpp could not make a context")

    def close() -> None:
        llama_cpp.llama_free(engine)
        llama_cpp.llama_model_free(model)

    return f"llama.cpp ({llama_cpp.__version__})", _Batch(model, engine, max(BATCH_TOKENS, slots)).run, close


class _Batch:
    """Runs prompts through one llama_batch, which is refilled for every step."""

    def __init__(self, model: Any, engine: Any, capacity: int):
        vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._model, self._engine, self._capacity, self._vocabulary = model, engine, capacity, vocabulary
        self._batch = llama_cpp.llama_batch_init(capacity, 0, 1)

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Arrivals:
        """Prefills the prompts in order, packed into batches. Then each step decodes one token of every stream."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._engine), True)
        arrivals: list[list[float]] = [[] for _ in prompts]
        tokens = [0] * len(prompts)
        began = time.perf_counter()
        waiting = [
            (token, position, stream, position == len(prompt) - 1)
            for stream, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        for start in range(0, len(waiting), self._capacity):
            self._step(waiting[start : start + self._capacity], tokens, arrivals)
        for generated in range(1, new_tokens):
            step = [(tokens[s], len(prompt) + generated - 1, s, True) for s, prompt in enumerate(prompts)]
            self._step(step, tokens, arrivals)
        return began, arrivals

    def _step(self, rows: list[tuple[int, int, int, bool]], tokens: list[int], arrivals: list[list[float]]) -> None:
        """Runs one llama.cpp step over rows of (token, position, stream, wants logits).

        For each row that wants logits, sets `tokens[stream]` to the greedy token and adds the time to `arrivals[stream]`.
        """
        batch = self._batch
        batch.n_tokens = len(rows)
        for row, (token, position, stream, wanted) in enumerate(rows):
            batch.token[row], batch.pos[row], batch.n_seq_id[row] = token, position, 1
            batch.seq_id[row][0], batch.logits[row] = stream, wanted
        if status := llama_cpp.llama_decode(self._engine, batch):
            raise RuntimeError(f"llama_decode: {status}")
        for row, (_, _, stream, wanted) in enumerate(rows):
            if wanted:
                logits = llama_cpp.llama_get_logits_ith(self._engine, row)
                tokens[stream] = int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())
        now = time.perf_counter()
        for _, _, stream, wanted in rows:
            if wanted:
                arrivals[stream].append(now)
