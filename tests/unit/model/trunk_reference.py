"""Plain transformers on the same checkpoint, the reference for trunks and published formats."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from moiety.model.checkpoint.checkpoint import Checkpoint

PROMPT_LENGTHS = (1, 11, 40)  # decode-like; within gpt-oss's sliding window of 16; past it
NEW_TOKENS = 12


def attention_of(architecture: str) -> str:
    """Returns the attention to load with: transformers has no sdpa for gpt-oss's attention sinks."""
    return "eager" if architecture == "gpt_oss" else "sdpa"


def reference(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32):
    """Loads the checkpoint in plain transformers."""
    attention = attention_of(checkpoint.architecture)
    return AutoModelForCausalLM.from_pretrained(
        checkpoint.path, dtype=dtype, attn_implementation=attention, local_files_only=True
    ).eval()


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    """Returns random token ids [1, length] without special tokens."""
    return torch.randint(3, 320, (1, length), generator=torch.Generator().manual_seed(seed + length))


def greedy(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Returns the greedy continuation by `generate`, with end-of-sequence tokens suppressed."""
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 2}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)
