"""Multi-head latent attention (MLA; DeepSeek-V2, arXiv:2405.04434) that caches only the latent, not its expansion.

transformers' MLA modules expand a token's latent to keys and values of every head (`expand_kv`) and then call the
attention function. Here `expand_kv` returns the latent unexpanded, as one key/value head whose values are the first
columns of its keys. The attention function absorbs the expansion of keys into the queries, and that of values into the
output. Norms, rotary embeddings, scaling and gates stay in transformers' code for the architecture.

    q · [W_UK c, k_rot] = [W_UKᵀ q_nope, q_rot] · [c, k_rot]        sum_s p_s (W_UV c_s) = W_UV (sum_s p_s c_s)

Legend: H query heads, R width of the latent c, Dn and Dr widths of a head's unrotated and rotated part, Dv width of its
values, T tokens. Multiply-adds per head for n tokens after P others: absorbed n (R (Dn + Dv) + (2 R + Dr) (P + n / 2)),
expanded (P + n) R (Dn + Dv) + n (Dn + Dr + Dv) (P + n / 2). Absorption makes decode affordable: with DeepSeek-V3's
widths, one token after 4096 others takes 4.6 million multiply-adds per head absorbed, and 538 million expanded.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moiety.model.seam import ModuleFact
from moiety.router.attention.paged import attend
from moiety.router.attention.sparse import uses_indexer

NAME = "moiety_latent"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Latent:
    """The weights that turn a layer's latent into keys and values: the two halves of kv_b_proj's weight, as views."""

    key: torch.Tensor  # [H, Dn, R], W_UK
    value: torch.Tensor  # [H, Dv, R], W_UV
    deterministic: bool = False  # a token's result does not depend, to the bit, on other tokens

    def absorb(self, query: torch.Tensor) -> torch.Tensor:
        """Turns queries [1, H, T, Dn + Dr] for expanded keys into queries [1, H, T, R + Dr] for latent keys."""
        unrotated = self.key.shape[1]
        return torch.cat((self._times(query[..., :unrotated], self.key), query[..., unrotated:]), dim=-1)

    def expand(self, output: torch.Tensor) -> torch.Tensor:
        """Turns weighted sums of latents [1, T, H, R] into weighted sums of values [1, T, H, Dv]."""
        return self._times(output.transpose(1, 2), self.value.mT).transpose(1, 2)

    def _times(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Multiplies rows [1, H, T, X] by weight [H, X, Y]; returns [1, H, T, Y]."""
        if not self.deterministic:
            return rows @ weight
        # The order of summation in a matrix product depends on its shape, so each token gets its own product.
        return torch.cat([token.contiguous() @ weight for token in rows.split(1, dim=2)], dim=2)


LATENT = ModuleFact[Latent]("latent")  # of the attention modules that cache their latent


def latent_of(module: Any, *, deterministic: bool = False) -> Latent:
    """Returns the Latent of an MLA module. Raises ValueError unless kv_b_proj's weight alone expands the latent."""
    expand, up = getattr(module, "expand_kv", None), module.kv_b_proj
    if expand is None or not isinstance(up, nn.Linear) or "bias" in dict(up.named_parameters()):
        raise ValueError("it has no expand_kv, or no linear kv_b_proj without bias")
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
        for expected, computed in ((expected_keys, keys), (latent @ found.value.mT, values)):
            # bf16 rounds to 0.004; another layout is off by 1.
            if (expected - computed).norm() > 0.02 * computed.norm():
                raise ValueError("its keys and values are not its latent times kv_b_proj")
    return found


def cache_latents(model: nn.Module, *, deterministic: bool = False) -> None:
    """Makes a trunk's MLA layers cache their latents. Leaves layers that use an indexer to `sparse.py`.

    Where `latent_of` raises ValueError, the layer caches expanded keys and values, and a warning names its class.
    Call once, after the weights are in their final storage, on a model whose attention is `paged.NAME`.
    """
    ALL_ATTENTION_FUNCTIONS.register(NAME, attend_latent)
    expanded: dict[str, tuple[int, float]] = {}
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if not (hasattr(module, "kv_a_proj_with_mqa") and hasattr(module, "kv_b_proj")) or uses_indexer(module):
            continue  # sparse.py handles layers with an indexer
        try:
            latent = latent_of(module, deterministic=deterministic)
        except ValueError as error:
            kind = f"{type(module).__name__}: {error}"
            times = module.kv_b_proj.out_features / module.kv_a_proj_with_mqa.out_features
            expanded[kind] = expanded.get(kind, (0, 0.0))[0] + 1, times
        else:
            LATENT.set(module, latent)
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
    """Computes a layer's attention: over its latents if it caches them, otherwise over its expanded keys and values."""
    if (latent := LATENT.of(module)) is None:
        return attend(module, query, key, value, attention_mask, **options)
    output, _ = attend(module, latent.absorb(query), key, value, attention_mask, shared_values=True, **options)
    return latent.expand(output), None


def _as_one_head(latent: torch.Tensor, rotated: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Replaces expand_kv. Joins latent [1, 1, T, R] and rotated [1, 1, T, Dr] to a key; the value is a view of the key."""
    key = torch.cat((latent, rotated), dim=-1)
    return key, key[..., : latent.shape[-1]]
