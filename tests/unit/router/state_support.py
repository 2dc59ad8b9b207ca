"""Small random hybrid models (attention and state layers), and their greedy outputs by plain transformers."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from engine_support import BLOCK_TOKENS, NoHop
from transformers import AutoConfig

from moiety.core.experts import ExpertMLP, ModelShape
from moiety.model.architectures.transformers_model import quiet_transformers
from moiety.router.attention import paged
from moiety.router.cache.cache_spec import CacheSpec
from moiety.router.cache.kv_cache import KVCache
from moiety.router.engine import Engine
from moiety.router.lanes import Lanes
from moiety.router.step_runner import StepRunner
from moiety.router.trunk import prepare_trunk
from moiety.telemetry.tracing import NO_TRACER

VOCABULARY = 97
NEW_TOKENS = 10
_BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ALTERNATING = ["linear_attention", "full_attention"] * 2
_DELTA: dict[str, Any] = {
    "num_experts": 8,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": _ALTERNATING,
}
_KIMI: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_token": 2,
    "moe_intermediate_size": 24,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
}
HYBRIDS: dict[str, dict[str, Any]] = {
    "jamba": {
        "num_experts": 4,
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 8,
        "use_mamba_kernels": False,
    },
    "qwen3_next": _DELTA,
    "qwen3_5_moe_text": _DELTA,
    "kimi_linear": {**_KIMI, "layer_types": _ALTERNATING, "model_max_length": 256},
    "bailing_hybrid": {
        **_KIMI,
        "num_hidden_layers": 6,
        "q_lora_rank": 24,
        "num_expert_group": 4,
        "topk_group": 2,
        "model_max_length": 256,
    },
    "lfm2_moe": {
        "num_experts": 8,
        "moe_intermediate_size": 24,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention"] * 2,
    },
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        "n_routed_experts": 8,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 24,
        "head_dim": 8,
        "ssm_state_size": 8,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "use_mamba_kernels": False,
    },
    "granitemoehybrid": {
        "num_local_experts": 8,
        "shared_intermediate_size": 24,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_expand": 2,
        "layer_types": _ALTERNATING,
    },
    "minimax": {"num_local_experts": 4, "head_dim": 8, "block_size": 8, "layer_types": _ALTERNATING},
    "zaya": {"num_experts": 4, "head_dim": 8, "num_experts_per_tok": 1},
}
_WINDOW: dict[str, Any] = {"num_local_experts": 4, "head_dim": 8, "sliding_window": 8}
WINDOWED: dict[str, dict[str, Any]] = {
    "llama4_text": {
        "intermediate_size_mlp": 48,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "head_dim": 8,
        "attention_chunk_size": 8,
        "floor_scale": 4,  # scales attention without rotation by position, from position 4 on
        "attn_scale": 2.0,
    },
    "gpt_oss": _WINDOW,
    "cohere2_moe": {**_WINDOW, "num_experts": 4},
    "mimo_v2_flash": {**_WINDOW, "n_routed_experts": 4, "moe_intermediate_size": 24, "v_head_dim": 6},
}
INDEXED: dict[str, dict[str, Any]] = {
    name: {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 24,
        "num_key_value_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "index_n_heads": 16,
        "index_head_dim": 16,
        "index_topk": 6,
    }
    for name in ("deepseek_v32", "glm_moe_dsa", "axk2", "hy_v4", "dots3_note_text")
}
INDEXED["dots3_note_text"] |= {  # every other layer has a window instead, with its own sizes
    "layer_types": ["indexed_attention", "sliding_attention"] * 2,
    "sliding_window": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 24,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8,
}


def hybrid(architecture: str) -> Any:
    """Builds a random transformers model, including its experts."""
    settings = {**_BASE, **{**HYBRIDS, **WINDOWED, **INDEXED}[architecture]}
    if "layers_block_type" in settings:
        del settings["num_hidden_layers"]
    config = AutoConfig.for_model(architecture, **settings)
    package = type(config).__module__.rsplit(".", 1)[0]
    module = importlib.import_module(f"{package}.modeling_{package.rsplit('.', 1)[1]}")
    name = next(name for name in dir(module) if name.endswith("ForCausalLM"))
    torch.manual_seed(0)
    with quiet_transformers():
        model = getattr(module, name)(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for path, parameter in model.named_parameters():
        if parameter.dim() > 1 and "A_log" not in path:
            parameter.normal_(0.0, 0.2, generator=generator)
    return model


SHAPE = ModelShape("hybrid", 1, 4, 2, ExpertMLP(32, 24), "float32", VOCABULARY, 256)


def prompt_of(seed: int, length: int) -> tuple[int, ...]:
    """Returns `length` random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, VOCABULARY, (length,), generator=generator).tolist())


@functools.cache
def reference(architecture: str) -> Any:
    """Returns the model as transformers runs it."""
    return hybrid(architecture)


@functools.cache
def transformers_tokens(architecture: str, prompt: tuple[int, ...]) -> list[int]:
    """Returns the next NEW_TOKENS greedy tokens after `prompt`, by transformers alone, with a cache for this text only."""
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
    with quiet_transformers():
        text = reference(architecture).generate(ids, attention_mask=torch.ones_like(ids), **options)
    return text[0, len(prompt) :].tolist()


def served(architecture: str, dtype: torch.dtype = torch.float32) -> tuple[Any, CacheSpec]:
    """Returns the same model, prepared to run packed steps, and its CacheSpec."""
    model = hybrid(architecture).to(dtype)
    model.set_attn_implementation(paged.NAME)
    return model, prepare_trunk(model, SHAPE)


def layers_of(model: Any) -> torch.nn.ModuleList:
    """Returns the decoder layers of `model`."""
    count = model.config.num_hidden_layers
    return next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count)


def engine_on(
    model: Any,
    spec: CacheSpec,
    *,
    slots: int = 4,
    token_budget: int = 16,
    blocks: int = 60,
    lanes: Lanes | None = None,
    backend: Any = None,
) -> Engine:
    """Builds an engine with `blocks` blocks of 4 tokens. Without a backend the model computes its own experts."""
    memory = slots * spec.bytes_per_slot + blocks * BLOCK_TOKENS * spec.bytes_per_token
    cache = KVCache(spec, memory, torch.device("cpu"), slots=slots, block_tokens=BLOCK_TOKENS, revision="r")
    return Engine(
        StepRunner(model, cache, [NoHop(), NoHop()] if lanes else [backend or NoHop()], lanes),
        cache,
        slots=slots,
        token_budget=token_budget,
        queue_limit=1000,
        threads=1,
        report_missing=lambda *_: None,
        tracer=NO_TRACER,
    )
