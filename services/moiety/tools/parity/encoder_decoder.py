"""Runs encoder-decoders by plain transformers, as the reference of `parity`: one unpadded prompt, one cached token at a time.

One forward pass over a whole output could give other logits than one pass per token: an expert of Switch Transformers or
NLLB-MoE takes a limited number of tokens per pass.

transformers' NLLB-MoE is not usable as a reference. Since 5.0 (still in 5.23) its `NllbMoeExperts` reads the router's 0/1
mask as expert ids: experts 0 and 1 get every token, all others none. The reference is transformers with this method
replaced: each token goes to its own experts, as in the published model. Tests compare the reference with a forward pass
written from the paper alone.
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
    """Corrects in place the experts of NLLB-MoE, which transformers computes wrongly. Returns `model`."""
    for module in model.modules():
        if type(module).__name__ == WRONG_EXPERTS:
            module.forward = MethodType(_own_experts, module)
    return model


@torch.inference_mode()
def generate(
    model: Any, prompts: Sequence[Sequence[int]], new_tokens: int
) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Returns two lists with an entry per prompt: decoder start and greedy tokens; their logits [1 + new tokens, V]."""
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
