"""Runs encoder-decoders by plain transformers, as the reference of `parity`: one unpadded prompt, one cached token at a time.

One forward pass over a whole output would give other logits than decoding: the experts of Switch Transformers and NLLB-MoE
take a limited number of tokens per pass, and in a cached decode each pass has one token.

transformers' NLLB-MoE is not usable as a reference. Since 5.0 (still in 5.23) its `NllbMoeExperts` takes the router's 0/1
mask for expert ids: experts 0 and 1 get every token, all others none. The reference is transformers with that one method
replaced by the published model's: each token goes to its own experts. Tests compare it with a forward pass written from
the paper alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch

WRONG_EXPERTS = "NllbMoeExperts"


def is_encoder_decoder(model: Any) -> bool:
    """Returns whether `model`, a transformers model or a PlainReference, is an encoder-decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def correct_experts(model: Any) -> Any:
    """Corrects the expert layers of `model` that transformers computes wrongly, those of NLLB-MoE. Returns `model`."""
    for module in model.modules():
        if type(module).__name__ == WRONG_EXPERTS:
            module.forward = MethodType(_own_experts, module)
    return model


@torch.inference_mode()
def generate(
    model: Any, prompts: Sequence[Sequence[int]], new_tokens: int
) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Returns (decoder start + greedy tokens, logits [1 + new tokens, V]) of each prompt."""
    texts, logits = [], []
    for prompt in prompts:
        text = model.generate(torch.tensor([prompt]), max_new_tokens=new_tokens, do_sample=False)[0].tolist()
        texts.append(text)
        logits.append(decode(model, prompt, text))
    return texts, logits


@torch.inference_mode()
def decode(model: Any, prompt: Sequence[int], text: Sequence[int], noise: torch.Tensor | None = None) -> torch.Tensor:
    """Encodes `prompt` and decodes `text`. Returns the logits [len(text), V] after each token of `text`.

    The prompt's embeddings are multiplied by `noise` [prompt tokens, D], if given.
    """
    ids = torch.tensor([prompt])
    if noise is None:
        encoded = model.get_encoder()(input_ids=ids)
    else:
        encoded = model.get_encoder()(inputs_embeds=model.get_input_embeddings()(ids) * noise)
    cache, logits = None, []
    for token in text:
        step = model(
            encoder_outputs=encoded, decoder_input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True
        )
        cache = step.past_key_values
        logits.append(step.logits[0, 0].float())
    return torch.stack(logits)


def _own_experts(module: Any, hidden_states: torch.Tensor, _: torch.Tensor, router_probs: torch.Tensor) -> torch.Tensor:
    """Replaces NllbMoeExperts.forward: each token goes to its own experts.

    hidden_states [T, D]; router_probs [T, E], zero except for a token's own experts.
    """
    summed = torch.zeros_like(hidden_states)
    for expert in range(module.num_experts):
        tokens = router_probs[:, expert].nonzero()[:, 0]
        computed = module[f"expert_{expert}"](hidden_states[tokens]) * router_probs[tokens, expert, None]
        summed.index_add_(0, tokens, (computed * (1 - module.moe_token_dropout)).to(summed.dtype))
    return summed
