"""Attention by an indexer (DeepSeek-V3.2, arXiv:2512.02556): the slower path, one sequence after another.

Which keys a token attends to, its layer's indexer decides from keys of its own. transformers' module does that for whole
sequences with a mask and a cache; here each sequence of a step goes through it by itself, with all its latents and
indexer keys read from the blocks, where they are kept as other keys and values are.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache

from moiety.router.cache.cache_spec import indexer_of
from moiety.router.token_rows import cut

_log = logging.getLogger(__name__)


class SequenceCache(Cache):
    """A transformers cache of one sequence of a step: what its layer keeps lies in the sequence's blocks."""

    def __init__(self, batch: Any):
        """`batch` holds this sequence's tokens and table alone."""
        super().__init__(layers=[])
        self._batch = batch

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[1, G, tokens, D] each, of the step -> [1, G, all, D], the whole sequence's."""
        keys, values = self._batch.store(layer_idx, key_states[0].transpose(0, 1), value_states[0].transpose(0, 1))
        return self._whole(keys), self._whole(values)

    def update_indexer(self, indexer_key_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
        """[1, tokens, D] of the step -> [1, all, D], the whole sequence's."""
        keys, _ = self._batch.store(indexer_of(layer_idx), indexer_key_states[0].unsqueeze(1), 0)
        return self._whole(keys)[:, 0]

    def _whole(self, pool: torch.Tensor) -> torch.Tensor:
        """[B, G, P, D] -> [1, G, all, D]"""
        blocks = pool[self._batch.tables[0].to(pool.device)]  # [M, G, P, D]
        return blocks.transpose(0, 1).flatten(1, 2)[None, :, : int(self._batch.length[-1])]


class SparseAttention:
    """Stands in for the `forward` of an MLA module with an indexer."""

    def __init__(self, module: Any, attention: str):
        """`attention`: "sdpa" or "eager", which take the indexer's choice as a mask."""
        self._compute, self._additive = module.forward, attention == "eager"
        module.config = copy.copy(module.config)
        module.config._attn_implementation = attention

    def __call__(self, *arguments: Any, moiety_batch: Any, **options: Any) -> Any:
        """The module's output for the tokens of a packed row, [1, T, ...]."""
        outputs, begin, tokens = [], 0, len(moiety_batch.length)
        for batch in moiety_batch.sequences():
            end = begin + len(batch.length)
            positions = batch.length.long() - 1
            seen = torch.arange(int(positions[-1]) + 1)[None] <= positions[:, None]  # [tokens, all]
            part_arguments, part_options = cut((arguments, options), (1, tokens), begin, end)
            hidden = next(v for v in (*part_arguments, *part_options.values()) if isinstance(v, torch.Tensor))
            mask = seen[None, None].to(hidden.device)
            if self._additive:
                mask = torch.zeros_like(mask, dtype=hidden.dtype).masked_fill(~mask, torch.finfo(hidden.dtype).min)
            given = {"past_key_values": SequenceCache(batch), "attention_mask": mask}
            outputs.append(self._compute(*part_arguments, **{**part_options, **given}))
            begin = end
        attended, _, *picked = zip(*outputs, strict=True)  # weights are nobody's to read; picked keys the next layer's
        return _joined(attended), None, *map(_joined, picked)


def uses_indexer(module: Any) -> bool:
    """Whether it is an attention module with an indexer, or one that takes over what an earlier layer's picked."""
    return getattr(module, "indexer", None) is not None or bool(getattr(module, "skip_topk", False))


def use_indexers(model: Any) -> None:
    """Lets the MLA layers with an indexer of a loaded router run, and says that they are slow."""
    found = [module for module in model.modules() if uses_indexer(module) and hasattr(module, "kv_b_proj")]
    for module in found:
        module.forward = SparseAttention(module, "sdpa" if model._supports_sdpa else "eager")
    if found:
        _log.warning(
            "%d layers attend to what their indexer picks: one sequence of a step after another, by transformers' own "
            "attention, more slowly than other layers",
            len(found),
        )


def _joined(parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """[1, tokens, ...] of each sequence -> of all; picked keys [1, tokens, K] are filled up with the first of them."""
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
