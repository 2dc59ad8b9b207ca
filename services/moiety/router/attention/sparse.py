"""Attention to tokens that an indexer picks (DeepSeek-V3.2, arXiv:2512.02556): slow, because sequences run one by one.

A layer's indexer caches keys of its own, and compares queries with them to pick the tokens that a token attends to.
transformers' attention module picks and attends for whole sequences, with a mask and a cache. Here the sequences of a
step pass through that module one after the other. The module reads a sequence's latents and indexer keys from the
blocks of the KV cache, which hold them like other keys and values.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache

from moiety.model.batch import Batch
from moiety.model.seam import current_batch
from moiety.router.cache.cache_spec import indexer_of
from moiety.router.token_rows import slice_tokens

_log = logging.getLogger(__name__)


class SequenceCache(Cache):
    """A transformers cache for one sequence of a step. It stores in the sequence's blocks what the layer caches."""

    def __init__(self, batch: Batch):
        """`batch` holds the tokens and the table of this sequence only."""
        super().__init__(layers=[])
        self._batch = batch

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores the step's keys and values [1, G, tokens, D]; returns those of the whole sequence, [1, G, all, D]."""
        keys, values = self._batch.store(layer_idx, key_states[0].transpose(0, 1), value_states[0].transpose(0, 1))
        return self._whole(keys), self._whole(values)

    def update_indexer(self, indexer_key_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
        """Stores the step's indexer keys [1, tokens, D]; returns those of the whole sequence, [1, all, D]."""
        keys, _ = self._batch.store(indexer_of(layer_idx), indexer_key_states[0].unsqueeze(1), 0)
        return self._whole(keys)[:, 0]

    def _whole(self, pool: torch.Tensor) -> torch.Tensor:
        """Reads the sequence's entries [1, G, all, D] from a pool [B, G, P, D]."""
        blocks = pool[self._batch.tables[0].to(pool.device)]  # [M, G, P, D]
        return blocks.transpose(0, 1).flatten(1, 2)[None, :, : int(self._batch.length[-1])]


class SparseAttention:
    """Replaces the `forward` of an MLA module that has an indexer or uses another layer's picked tokens."""

    def __init__(self, module: Any, attention: str):
        """`attention`: "sdpa" or "eager". Both take the indexer's choice as a mask."""
        self._compute, self._additive = module.forward, attention == "eager"
        module.config = copy.copy(module.config)
        module.config._attn_implementation = attention

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Returns the module's output for the tokens of a packed row, [1, T, ...]."""
        step = current_batch()
        outputs, begin, tokens = [], 0, len(step.length)
        for batch in step.sequences():
            end = begin + len(batch.length)
            positions = batch.length.long() - 1
            visible = torch.arange(int(positions[-1]) + 1)[None] <= positions[:, None]  # [tokens, all]
            part_arguments, part_options = slice_tokens((arguments, options), (1, tokens), begin, end)
            hidden = next(v for v in (*part_arguments, *part_options.values()) if isinstance(v, torch.Tensor))
            mask = visible[None, None].to(hidden.device)
            if self._additive:
                mask = torch.zeros_like(mask, dtype=hidden.dtype).masked_fill(~mask, torch.finfo(hidden.dtype).min)
            replaced = {"past_key_values": SequenceCache(batch), "attention_mask": mask}
            outputs.append(self._compute(*part_arguments, **{**part_options, **replaced}))
            begin = end
        attended, _, *picked = zip(*outputs, strict=True)  # drops the weights; the next layer may use the picked keys
        return _joined(attended), None, *map(_joined, picked)


def uses_indexer(module: Any) -> bool:
    """Whether `module` is an attention module with an indexer, or one that uses the tokens an earlier layer picked."""
    return getattr(module, "indexer", None) is not None or bool(getattr(module, "skip_topk", False))


def use_indexers(model: Any) -> None:
    """Prepares a trunk's MLA layers with an indexer to run on packed steps, and warns that they are slow."""
    found = [module for module in model.modules() if uses_indexer(module) and hasattr(module, "kv_b_proj")]
    for module in found:
        module.forward = SparseAttention(module, "sdpa" if model._supports_sdpa else "eager")
    if found:
        _log.warning(
            "%d layers attend to tokens that an indexer picks. They run one sequence of a step after another, with "
            "transformers' own attention, and are slower than other layers",
            len(found),
        )


def _joined(parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Joins one output of every sequence, [1, tokens, ...] each, to [1, T, ...]; None if any of them is None.

    Picks [1, tokens, K] of a short sequence have a smaller K: copies of a token's first pick fill up to the largest K.
    """
    if any(part is None for part in parts):
        return None
    tensors = [part for part in parts if part is not None]
    widest = max(part.shape[-1] for part in tensors)
    return torch.cat(
        [
            torch.cat((part, part[..., :1].expand(*part.shape[:-1], widest - part.shape[-1])), dim=-1)
            for part in tensors
        ],
        dim=1,
    )
