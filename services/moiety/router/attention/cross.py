"""Attention of encoder-decoders: within each prompt, along the output, and from the output to its prompt.

The keys and values of a prompt lie in blocks of the same pool as those of the output, because a decoder layer caches the
same amount for a prompt token as for an output token. A step's row mixes tokens of many sequences, so biases by
relative position (T5, arXiv:1910.10683) are passed to attention as tables over distances, not computed for each pair.

Shape legend: T tokens of the decoder's row, E tokens of all prompts to encode, n tokens of one prompt, H heads, Dk and Dv
head widths.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moiety.model.seam import current_batch, current_prompts
from moiety.model.trunk.encoder_decoder import ATTENDS_TO_PROMPT, EncoderDecoder
from moiety.router.attention.paged import attend
from moiety_kernels.ops.paged_attention import paged_attention
from moiety_kernels.reference.attention import AttentionOptions

NAME = "moiety_cross"


def use_cross_attention(model: nn.Module) -> None:
    """Makes the layers of a loaded encoder-decoder use this module's attention; does nothing to other models."""
    if not isinstance(model, EncoderDecoder):
        return
    ALL_ATTENTION_FUNCTIONS.register(NAME, attend_encoder_decoder)
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if getattr(module, "has_relative_attention_bias", False):
            _use_distance_table(module)
        if hasattr(module, "config"):
            module.config._attn_implementation = NAME


def attend_encoder_decoder(
    module: Any,
    query: torch.Tensor,  # [1, H, T or E, Dk]
    key: torch.Tensor,  # [1, H, T or E, Dk]
    value: torch.Tensor,  # [1, H, T or E, Dv]
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    position_bias: torch.Tensor | None = None,  # [H, N]: see `_use_distance_table`
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Computes attention within a prompt, along the output, or from the output to its prompt, depending on `module`.

    Returns [1, T or E, H, Dv].
    """
    prompts = current_prompts()
    if not module.is_decoder:
        return _attend_within_prompts(query, key, value, prompts.lengths, scaling, position_bias), None
    if not ATTENDS_TO_PROMPT.of(module):
        return attend(module, query, key, value, None, scaling, distance_bias=position_bias)
    keys, values = prompts.store(module.layer_idx, key[0].transpose(0, 1), value[0].transpose(0, 1))
    output = paged_attention(
        query[0].transpose(0, 1),
        keys,
        values,
        prompts.tables,
        current_batch().sequence,
        prompts.length,
        AttentionOptions(query.shape[-1] ** -0.5 if scaling is None else scaling),
    )
    return output.unsqueeze(0), None


def _attend_within_prompts(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: tuple[int, ...],
    scaling: float | None,
    position_bias: torch.Tensor | None,
) -> torch.Tensor:
    """Attends from every token of a prompt to that whole prompt.

    Computes one prompt at a time, so that its result does not depend, to the bit, on the other prompts of the step.
    """
    outputs = []
    for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True):
        bias = None if position_bias is None else _pairwise_bias(position_bias, q.shape[2])
        outputs.append(functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scaling))
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _pairwise_bias(bias: torch.Tensor, tokens: int) -> torch.Tensor:
    """Expands a table [H, 2 R + 1] over distances -R to R to the bias [1, H, n, n] of each query for each key."""
    reach = bias.shape[1] // 2
    position = torch.arange(tokens, device=bias.device)
    return bias[:, (position - position[:, None]).clamp(-reach, reach) + reach].unsqueeze(0)


def _use_distance_table(module: Any) -> None:
    """Makes a module's `compute_bias` return a table over distances instead of the biases of all pairs of tokens.

    A decoder's table, [H, R + 1], has the biases of keys 0 to R tokens before the query. An encoder's table,
    [H, 2 R + 1], has those of distances -R to R. R is the model's largest distance. Keys farther away have the bias of
    the nearest distance in the table.
    """
    reach: int = module.relative_attention_max_distance
    relative = torch.arange(-reach, reach + 1, device=module.relative_attention_bias.weight.device)
    if module.is_decoder:
        relative = relative[: reach + 1].flip(0)
    buckets = module._relative_position_bucket(
        relative,
        bidirectional=not module.is_decoder,
        num_buckets=module.relative_attention_num_buckets,
        max_distance=reach,
    )
    table = module.relative_attention_bias(buckets).T.contiguous()
    module.compute_bias = lambda *_, **__: table
