"""Multi-head latent attention (MLA; DeepSeek-V2, arXiv:2405.04434) that caches the latent, and nothing expanded from it.

transformers' MLA modules expand a token's latent to keys and values of every head (`expand_kv`) and then call the
attention function. Here `expand_kv` hands the latent on as it is, as one key/value head whose values are the first
columns of its keys, and the attention function absorbs the expansion: of keys into the queries, of values into the
output. Norms, rotary embeddings, scaling and gates stay transformers', whatever the architecture does there.

    q · [W_UK c, k_rot] = [W_UKᵀ q_nope, q_rot] · [c, k_rot]        sum_s p_s (W_UV c_s) = W_UV (sum_s p_s c_s)

Legend: H query heads, R width of the latent c, Dn and Dr widths of a head's unrotated and rotated part, Dv of its
values, T tokens. Multiply-adds per head for n tokens behind P others: absorbed n (R (Dn + Dv) + (2 R + Dr) (P + n / 2)),
expanded (P + n) R (Dn + Dv) + n (Dn + Dr + Dv) (P + n / 2). In decode absorbing is what makes MLA affordable: for
DeepSeek-V3 behind 4096 tokens 4.6 million against 538.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moiety.router.attention.paged import attend
from moiety.router.attention.sparse import uses_indexer

NAME = "moiety_latent"
LATENT_ATTRIBUTE = "moiety_latent"  # set on each attention module that caches its latent

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Latent:
    """What turns a layer's latent into keys and values: the two halves of kv_b_proj's weight, as views of it."""

    key: torch.Tensor  # [H, Dn, R], W_UK
    value: torch.Tensor  # [H, Dv, R], W_UV
    deterministic: bool = False  # a token's bits depend on that token alone

    def absorb(self, query: torch.Tensor) -> torch.Tensor:
        """Queries [1, H, T, Dn + Dr] for expanded keys -> [1, H, T, R + Dr] for latent ones."""
        unrotated = self.key.shape[1]
        return torch.cat((self._times(query[..., :unrotated], self.key), query[..., unrotated:]), dim=-1)

    def expand(self, output: torch.Tensor) -> torch.Tensor:
        """Sums of latents [1, T, H, R] -> sums of values [1, T, H, Dv]."""
        return self._times(output.transpose(1, 2), self.value.mT).transpose(1, 2)

    def _times(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """rows [1, H, T, X] times weight [H, X, Y] -> [1, H, T, Y]."""
        if not self.deterministic:
            return rows @ weight
        # How a product of matrices is summed depends on its shape, so every token has one of its own.
        return torch.cat([token.contiguous() @ weight for token in rows.split(1, dim=2)], dim=2)


def latent_of(module: Any, *, deterministic: bool = False) -> Latent:
    """The Latent of an MLA module. Raises ValueError where its expansion is not the one that can be absorbed."""
    expand, up = getattr(module, "expand_kv", None), module.kv_b_proj
    if expand is None or not isinstance(up, nn.Linear) or "bias" in dict(up.named_parameters()):
        raise ValueError("it expands its latent in a way of its own")
    weight, rank = up.weight.detach(), up.in_features
    generator = torch.Generator().manual_seed(0)

    def random(width: int) -> torch.Tensor:
        return torch.randn(1, 1, 4, width, generator=generator).to(weight)

    latent, rotated = random(rank), random(module.kv_a_proj_with_mqa.out_features - rank)
    with torch.no_grad():
        keys, values = expand(latent, rotated)  # [1, H, 4, Dn + Dr], [1, H, 4, Dv]
        heads, unrotated, value_width = keys.shape[1], keys.shape[-1] - rotated.shape[-1], values.shape[-1]
        if up.out_features != heads * (unrotated + value_width):
            raise ValueError("the widths of its keys and values are not those of kv_b_proj")
        rows = weight.view(heads, unrotated + value_width, rank)
        found = Latent(rows[:, :unrotated], rows[:, unrotated:], deterministic)
        expected_keys = torch.cat((latent @ found.key.mT, rotated.expand(-1, heads, -1, -1)), dim=-1)
        for expected, told in ((expected_keys, keys), (latent @ found.value.mT, values)):
            if (expected - told).norm() > 0.02 * told.norm():  # bf16 rounds to 0.004; another layout is off by 1
                raise ValueError("its keys and values are not its latent times kv_b_proj")
    return found


def cache_latents(model: nn.Module, *, deterministic: bool = False) -> None:
    """Makes each MLA layer of a loaded router cache its latent; those that cannot are named in the log, and expand.

    Call once, after the weights lie where they will stay, on a model whose attention is `attention.NAME`.
    """
    ALL_ATTENTION_FUNCTIONS.register(NAME, attend_latent)
    expanded: dict[str, tuple[int, float]] = {}
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if not (hasattr(module, "kv_a_proj_with_mqa") and hasattr(module, "kv_b_proj")) or uses_indexer(module):
            continue  # where there is an indexer: see sparse.py
        try:
            latent = latent_of(module, deterministic=deterministic)
        except ValueError as error:
            kind = f"{type(module).__name__}: {error}"
            times = module.kv_b_proj.out_features / module.kv_a_proj_with_mqa.out_features
            expanded[kind] = expanded.get(kind, (0, 0.0))[0] + 1, times
        else:
            setattr(module, LATENT_ATTRIBUTE, latent)
            module.expand_kv = _as_one_head
            module.config._attn_implementation = NAME
    for kind, (layers, times) in expanded.items():
        _log.warning("%d layers cache expanded keys and values, over %.1f times their latent (%s)", layers, times, kind)


def attend_latent(
    module: Any,
    query: torch.Tensor,  # [1, H, T, Dn + Dr]
    key: torch.Tensor,  # [1, 1, T, R + Dr]
    value: torch.Tensor,  # [1, 1, T, R], the first columns of key
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """`attend` for the layers of a model that caches latents; a layer among them that does not is simply attended."""
    latent: Latent | None = getattr(module, LATENT_ATTRIBUTE, None)
    if latent is None:
        return attend(module, query, key, value, attention_mask, **options)
    output, _ = attend(module, latent.absorb(query), key, value, attention_mask, shared_values=True, **options)
    return latent.expand(output), None


def _as_one_head(latent: torch.Tensor, rotated: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Stands where expand_kv stood: latent [1, 1, T, R] and rotated [1, 1, T, Dr] -> key, and value as a view of it."""
    key = torch.cat((latent, rotated), dim=-1)
    return key, key[..., : latent.shape[-1]]
