"""NLLB-MoE in plain torch, written from its papers alone.

A Transformer (arXiv:1706.03762) with layer norms before its blocks, sinusoidal positions as fairseq counts them, and
GShard's two experts a token (arXiv:2006.16668, algorithm 1), whose gates are normalised over the two. NLLB
(arXiv:2207.04672) scales experts' outputs by the share that training did not mask.

One prompt, no cache: every token of an output is computed from the beginning. The decoder's experts take one token a pass.
Legend: T tokens, D width, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import layer_norm, linear


class NllbReference:
    """The model, from `weights` by published name."""

    def __init__(self, weights: Mapping[str, torch.Tensor], config: Mapping[str, Any]):
        self._weights, self._config = weights, config

    def logits(self, prompt: Sequence[int], output: Sequence[int]) -> torch.Tensor:
        """Returns logits [len(output), V] after each token of `output`, which begins with the decoder's start token."""
        encoded = self._embed(prompt)
        for layer in range(self._config["encoder_layers"]):
            name = f"model.encoder.layers.{layer}"
            encoded = encoded + self._attend(f"{name}.self_attn", self._norm(f"{name}.self_attn_layer_norm", encoded))
            encoded = encoded + self._feed_forward(
                name, layer, self._config["encoder_sparse_step"], encoded, together=True
            )
        encoded = self._norm("model.encoder.layer_norm", encoded)
        hidden = self._embed(output)
        for layer in range(self._config["decoder_layers"]):
            name = f"model.decoder.layers.{layer}"
            normed = self._norm(f"{name}.self_attn_layer_norm", hidden)
            hidden = hidden + self._attend(f"{name}.self_attn", normed, causal=True)
            normed = self._norm(f"{name}.cross_attention_layer_norm", hidden)
            hidden = hidden + self._attend(f"{name}.cross_attention", normed, encoded)
            hidden = hidden + self._feed_forward(
                name, layer, self._config["decoder_sparse_step"], hidden, together=False
            )
        return self._norm("model.decoder.layer_norm", hidden) @ self._weights["model.shared.weight"].T

    def _embed(self, ids: Sequence[int]) -> torch.Tensor:
        """Returns [T, D]: token embeddings plus sinusoidal positions, which start after the padding's id."""
        width, padding = self._config["d_model"], self._config["pad_token_id"]
        words = self._weights["model.shared.weight"][torch.tensor(ids)]
        words = words * math.sqrt(width) if self._config["scale_embedding"] else words
        half = width // 2
        position = torch.arange(len(ids)).float() + padding + 1
        angles = position[:, None] * torch.exp(torch.arange(half).float() * -(math.log(10000) / (half - 1)))
        return words + torch.cat((angles.sin(), angles.cos()), dim=1)

    def _attend(
        self, name: str, hidden: torch.Tensor, memory: torch.Tensor | None = None, causal: bool = False
    ) -> torch.Tensor:
        heads = self._config["decoder_attention_heads"]
        source = hidden if memory is None else memory
        # [heads, T, D / heads]
        query = self._linear(f"{name}.q_proj", hidden).unflatten(1, (heads, -1)).transpose(0, 1)
        key, value = (
            self._linear(f"{name}.{kind}", source).unflatten(1, (heads, -1)).transpose(0, 1)
            for kind in ("k_proj", "v_proj")
        )
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -math.inf)
        return self._linear(f"{name}.out_proj", (scores.softmax(-1) @ value).transpose(0, 1).flatten(1))

    def _feed_forward(self, name: str, layer: int, every: int, hidden: torch.Tensor, *, together: bool) -> torch.Tensor:
        """The MLP or MoE of one layer. `together`: the tokens share the experts' capacity, as in one pass."""
        normed = self._norm(f"{name}.ff_layer_norm", hidden)
        if (layer + 1) % every:
            return self._mlp(f"{name}.ffn", normed)
        passes = [normed] if together else list(normed.split(1))
        return torch.cat([self._experts(f"{name}.ffn", rows) for rows in passes])

    def _experts(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """The MoE: capacity goes to the tokens' first experts, in token order, then to their second experts."""
        probabilities = linear(rows, self._weights[f"{name}.router.classifier.weight"]).softmax(-1)  # [T, E]
        chosen = probabilities.topk(2).indices.tolist()
        capacity = [math.ceil(self._config["moe_eval_capacity_token_fraction"] * len(rows))] * probabilities.shape[1]
        kept: list[list[int]] = [[] for _ in chosen]
        for choice in (0, 1):
            for token, experts in enumerate(chosen):
                if capacity[experts[choice]] > 0:
                    kept[token].append(experts[choice])
                capacity[experts[choice]] -= 1
        out = torch.zeros_like(rows)
        for token, experts in enumerate(kept):
            for expert in experts:
                gate = probabilities[token, expert] / sum(probabilities[token, e] for e in experts)
                computed = self._mlp(f"{name}.experts.expert_{expert}", rows[token : token + 1])[0]
                out[token] += gate * computed * (1 - self._config["moe_token_dropout"])
        return out

    def _mlp(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        return self._linear(f"{name}.fc2", self._linear(f"{name}.fc1", rows).relu())

    def _linear(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        return linear(rows, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"])

    def _norm(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        return layer_norm(rows, rows.shape[-1:], self._weights[f"{name}.weight"], self._weights[f"{name}.bias"])
