"""Plain forwards of the architectures that transformers lacks, written from their papers and published configs.

Naive on purpose: one sequence, all tokens recomputed, loops over tokens and heads where that is simpler; uses neither
Moiety nor transformers. FORWARDS: model_type -> load(folder, dtype) -> a function ids [T] -> logits [T, V].
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn import functional

Weights = dict[str, torch.Tensor]
Forward = Callable[[torch.Tensor], torch.Tensor]


def read(folder: Path, dtype: torch.dtype) -> tuple[dict[str, Any], Weights]:
    """Reads config.json, and every tensor by its published name."""
    weights: Weights = {}
    for shard in sorted(Path(folder).glob("*.safetensors")):
        weights |= {name: tensor.to(dtype) for name, tensor in load_file(shard).items()}
    return json.loads((Path(folder) / "config.json").read_text()), weights


def norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """RMSNorm of x [..., D]."""
    return weight * (x.float() / (x.float().pow(2).mean(-1, keepdim=True) + epsilon).sqrt()).to(x.dtype)


def rotate(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotates x [T, width] by positions 0, 1, …: coordinate i pairs with coordinate i + width / 2, as in GPT-NeoX."""
    half = x.shape[1] // 2
    angles = torch.arange(x.shape[0])[:, None].float() / theta ** (torch.arange(half).float() / half)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[:, :half], x[:, half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=1)


def attention(
    x: torch.Tensor,
    weights: Weights,
    name: str,
    config: dict[str, Any],
    scale: float | None = None,
    cap: float = math.inf,
) -> torch.Tensor:
    """Causal attention, one head after the other; consecutive query heads share a key head."""
    heads, groups, theta = config["num_attention_heads"], config["num_key_value_heads"], 10000.0
    q, k, v = (x @ weights[f"{name}.{part}_proj.weight"].T for part in "qkv")
    width = q.shape[1] // heads
    outputs = []
    for head in range(heads):
        group = head // (heads // groups)
        query = rotate(q[:, head * width : (head + 1) * width], theta)
        key = rotate(k[:, group * width : (group + 1) * width], theta)
        logits = (query @ key.T) * (width**-0.5 if scale is None else scale)
        if cap < math.inf:
            logits = cap * torch.tanh(logits / cap)
        future = torch.ones(len(x), len(x)).triu(1).bool()
        probabilities = logits.float().masked_fill(future, -math.inf).softmax(-1).to(x.dtype)
        outputs.append(probabilities @ v[:, group * width : (group + 1) * width])
    return torch.cat(outputs, dim=1) @ weights[f"{name}.o_proj.weight"].T


def gated(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, act: Any = functional.silu
) -> torch.Tensor:
    """down(act(gate x) * up x)."""
    return (act(x @ gate.T) * (x @ up.T)) @ down.T


def route(
    x: torch.Tensor,
    gate: torch.Tensor,
    top_k: int,
    normalise: bool,
    expert: Callable[[int, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Routed experts' output for x [T, D]: softmax over all experts, then top k, one token after the other."""
    rows = []
    for token in x:
        probabilities = (gate @ token).float().softmax(-1)
        best = probabilities.topk(top_k)
        total = best.values.sum() if normalise else 1.0
        parts = [expert(int(e), token) * (weight / total).to(x.dtype) for weight, e in zip(*best, strict=True)]
        rows.append(torch.stack(parts).sum(0))
    return torch.stack(rows)


def decoder(config: dict[str, Any], weights: Weights, layer: Callable[[int, torch.Tensor], torch.Tensor]) -> Forward:
    """Embedding, layers, final norm and head, with Llama's tensor names."""

    def forward(ids: torch.Tensor) -> torch.Tensor:
        x = weights["model.embed_tokens.weight"][ids]
        for index in range(config["num_hidden_layers"]):
            x = layer(index, x)
        return norm(x, weights["model.norm.weight"], config["rms_norm_eps"]) @ weights["lm_head.weight"].T

    return forward


def deepseek(folder: Path, dtype: torch.dtype) -> Forward:
    """DeepSeek-MoE 16B: arXiv:2401.06066, section 3, and the config of deepseek-moe-16b-base."""
    config, w = read(folder, dtype)
    epsilon, projections = config["rms_norm_eps"], ("gate_proj", "up_proj", "down_proj")

    def mlp(name: str, x: torch.Tensor) -> torch.Tensor:
        return gated(x, *(w[f"{name}.{part}.weight"] for part in projections))

    def layer(index: int, x: torch.Tensor) -> torch.Tensor:
        name = f"model.layers.{index}"
        x = x + attention(norm(x, w[f"{name}.input_layernorm.weight"], epsilon), w, f"{name}.self_attn", config)
        y = norm(x, w[f"{name}.post_attention_layernorm.weight"], epsilon)
        if index < config["first_k_dense_replace"]:
            return x + mlp(f"{name}.mlp", y)
        routed = route(
            y,
            w[f"{name}.mlp.gate.weight"],
            config["num_experts_per_tok"],
            config["norm_topk_prob"],
            lambda e, token: mlp(f"{name}.mlp.experts.{e}", token),
        )
        return x + mlp(f"{name}.mlp.shared_experts", y) + routed

    return decoder(config, w, layer)


def arctic(folder: Path, dtype: torch.dtype) -> Forward:
    """Snowflake Arctic: the dense-MoE hybrid of its cookbooks, and the config of snowflake-arctic-instruct."""
    config, w = read(folder, dtype)
    epsilon = config["rms_norm_eps"]

    def mlp(name: str, x: torch.Tensor) -> torch.Tensor:
        return gated(x, w[f"{name}.w1.weight"], w[f"{name}.w3.weight"], w[f"{name}.w2.weight"])

    def layer(index: int, x: torch.Tensor) -> torch.Tensor:
        name = f"model.layers.{index}"
        a = x + attention(norm(x, w[f"{name}.input_layernorm.weight"], epsilon), w, f"{name}.self_attn", config)
        post_norm, block = w[f"{name}.post_attention_layernorm.weight"], f"{name}.block_sparse_moe"
        if (index + 1) % config["moe_layer_frequency"] != 0:
            return a + mlp(f"{block}.mlp", norm(a, post_norm, epsilon))
        moe = route(
            norm(x, post_norm, epsilon),
            w[f"{block}.gate.weight"],
            config["num_experts_per_tok"],
            True,
            lambda e, token: mlp(f"{block}.experts.{e}", token),
        )
        return a + mlp(f"{name}.residual_mlp", norm(a, w[f"{name}.residual_layernorm.weight"], epsilon)) + moe

    return decoder(config, w, layer)


def glam(folder: Path, dtype: torch.dtype) -> Forward:
    """GLaM: arXiv:2112.06905, section 4, with rotary positions and without biases (see `definitions/glam.py`)."""
    config, w = read(folder, dtype)
    epsilon = config["rms_norm_eps"]

    def layer(index: int, x: torch.Tensor) -> torch.Tensor:
        name = f"model.layers.{index}"
        x = x + attention(norm(x, w[f"{name}.input_layernorm.weight"], epsilon), w, f"{name}.self_attn", config)
        y, mlp = norm(x, w[f"{name}.post_attention_layernorm.weight"], epsilon), f"{name}.mlp"
        if (index + 1) % config["moe_layer_frequency"] != 0:
            names = (f"{mlp}.{part}_proj.weight" for part in ("gate", "up", "down"))
            return x + gated(y, *(w[tensor] for tensor in names), functional.gelu)

        def expert(e: int, token: torch.Tensor) -> torch.Tensor:
            up, down = w[f"{mlp}.experts.{e}.up_proj.weight"], w[f"{mlp}.experts.{e}.down_proj.weight"]
            return down @ functional.gelu(up @ token)

        return x + route(y, w[f"{mlp}.gate.weight"], config["num_experts_per_tok"], True, expert)

    return decoder(config, w, layer)


def grok(folder: Path, dtype: torch.dtype) -> Forward:
    """Grok-1: xai-org/grok-1's README and model description, with the tensor names of hpcai-tech/grok-1."""
    config, w = read(folder, dtype)
    epsilon = config["rms_norm_eps"]

    def forward(ids: torch.Tensor) -> torch.Tensor:
        x = w["model.embed_tokens.weight"][ids] * config["embedding_multiplier_scale"]
        for index in range(config["num_hidden_layers"]):
            name = f"model.layers.{index}"
            scales = {part: w[f"{name}.{part}_norm.scale"] for part in ("pre_attn", "post_attn", "pre_moe", "post_moe")}
            y = attention(
                norm(x, scales["pre_attn"], epsilon),
                w,
                f"{name}.attn",
                config,
                scale=config["attn_output_multiplier"],
                cap=config["max_attn_value"],
            )
            x = x + norm(y, scales["post_attn"], epsilon)
            experts = f"{name}.moe_block.experts"

            def expert(e: int, token: torch.Tensor, experts: str = experts) -> torch.Tensor:
                parts = (w[f"{experts}.{e}.{part}.weight"] for part in ("linear", "linear_v", "linear_1"))
                return gated(token, *parts, functional.gelu)

            gate = w[f"{name}.moe_block.gate.weight"]
            y = route(norm(x, scales["pre_moe"], epsilon), gate, config["num_experts_per_tok"], False, expert)
            x = x + norm(y, scales["post_moe"], epsilon)
        head = w["model.embed_tokens.weight"]
        return norm(x, w["model.norm.scale"], epsilon) @ head.T * config["output_multiplier_scale"]

    return forward


FORWARDS = {"arctic": arctic, "deepseek": deepseek, "glam": glam, "grok-1": grok}
