"""Trains a small MoE language model in a minute or two on text that ships with Python.

`moiety bench quantize` measures on it, because the quality of a model with random weights means nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moiety.model.architectures.transformers_model import quiet_transformers
from moiety.model.checkpoint.tokenizer import open_tokenizer
from moiety.synthetic.tokenizer import BOS, EOS, PAD, VOCABULARY, write_tokenizer

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
SEQUENCE, BATCH, RATE = 128, 16, 3e-3
WARM_UP = 20  # steps


def train(
    folder: Path, text: str, *, steps: int = 400, seed: int = 0, progress: Callable[[str], None] = lambda _: None
) -> float:
    """Trains a qwen3_moe and writes it to `folder` in bfloat16. Returns the last steps' mean loss in nats per token.

    Runs on one thread, so that the result does not depend on the number of cores. More threads would not be faster on
    matrices this small.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _train(folder, text, steps, seed, progress)
    finally:
        torch.set_num_threads(threads)


def _train(folder: Path, text: str, steps: int, seed: int, progress: Callable[[str], None]) -> float:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    tokenizer, _ = open_tokenizer(str(folder))
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES)).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / WARM_UP) * (1.0 - 0.9 * step / steps)
    )
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    reported = time.monotonic()
    for step in range(steps):
        starts = torch.randint(0, len(ids) - SEQUENCE, (BATCH,), generator=generator)
        batch = torch.stack([ids[start : start + SEQUENCE] for start in starts.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if time.monotonic() - reported > 5:
            reported = time.monotonic()
            progress(f"step {step + 1} of {steps}: loss {losses[-1]:.2f}")
    with quiet_transformers():
        model.eval().to(torch.bfloat16).save_pretrained(folder)
    last = losses[-20:]
    return sum(last) / len(last)
