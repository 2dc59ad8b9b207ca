"""Writes a trained model as a checkpoint folder in the published layout of Qwen3-MoE."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3MoeForCausalLM

from moiety.training.model import Sizes
from moiety.training.tokenizer import FILES

DEFAULTS = GenerationConfig(
    do_sample=True, temperature=0.7, top_p=0.9, repetition_penalty=1.1, eos_token_id=0, pad_token_id=0
)


def publish(model: Qwen3MoeForCausalLM, sizes: Sizes, tokenizer: Path, folder: Path) -> None:
    """Writes weights in bfloat16, config, generation defaults and the tokenizer of the folder `tokenizer` to `folder`."""
    plain = AutoModelForCausalLM.from_config(sizes.config(), dtype=torch.float32)  # without the parts of training
    plain.load_state_dict(model.state_dict())
    plain.generation_config = DEFAULTS
    plain.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors leaves it to its owner alone
    for name in FILES:
        shutil.copy(tokenizer / name, folder / name)
