"""MLA layers that cache their latent, against transformers' own expanded form."""

from __future__ import annotations

import importlib
import logging
from typing import Any

import pytest
import torch
from engine_support import NoHop
from transformers import AutoConfig

from moiety.core.experts import ExpertMLP, ModelShape
from moiety.errors import CheckpointError
from moiety.model.architectures.transformers_model import quiet_transformers
from moiety.model.seam import forward_context
from moiety.router.attention import latent, paged
from moiety.router.attention.paged import DiscoveryBatch
from moiety.router.attention.step_batch import StepBatch
from moiety.router.cache.blocks import BlockTable
from moiety.router.cache.cache_spec import CacheSpec
from moiety.router.cache.kv_cache import KVCache
from moiety.router.layer_discovery import discover_cache_spec, run_once

RANK, UNROTATED, ROTATED, VALUE = 16, 12, 8, 10
HEADS, LAYERS = 4, 2
BASE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": RANK,
    "qk_nope_head_dim": UNROTATED,
    "qk_rope_head_dim": ROTATED,
    "v_head_dim": VALUE,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
    "original_max_position_embeddings": 512,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"q_lora_rank": None, "topk_method": "greedy"},  # complex rotation, no query latent
    "deepseek_v3": {"rope_parameters": YARN, "max_position_embeddings": 2048},  # interleaved rotation, corrected scale
    "glm4_moe_lite": {},
    "axk1": {},
    "minicpm3": {},  # rotation by halves
    "youtu": {},
    "longcat_flash": {
        "num_layers": 1,
        "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 24,
        "moe_topk": 2,
        "head_dim": 8,
    },
    "mistral4": {},  # queries scaled by position
}
TOKENS = torch.randint(3, 320, (1, 40), generator=torch.Generator().manual_seed(0))
STEPS = (25, 10, 1, 1, 1, 1, 1)


def model_of(architecture: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """Builds a random transformers model, including its experts."""
    config = AutoConfig.for_model(architecture, **{**BASE, **ARCHITECTURES.get(architecture, {}), **overrides})
    module = importlib.import_module(f"transformers.models.{architecture}.modeling_{architecture}")
    name = next(name for name in dir(module) if name.endswith("ForCausalLM"))
    model = getattr(module, name)(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0.0, 0.15, generator=generator)
    return model.to(dtype)


def probed(model: Any) -> CacheSpec:
    """Returns the CacheSpec of its attention layers, without the checks of `discover_cache_spec`."""
    run_once(model, batch := DiscoveryBatch())
    return CacheSpec(batch.layers)


def served(model: Any) -> tuple[torch.Tensor, CacheSpec]:
    """Returns logits [1, 40, V] through the router's attention: a prompt in two chunks, then token by token."""
    spec = probed(model)
    cache = KVCache(spec, 1 << 22, torch.device("cpu"))
    table = BlockTable()
    assert cache.grow(table, TOKENS.shape[1]) == TOKENS.shape[1]
    logits, past = [], 0
    for count in STEPS:
        batch = StepBatch.build(cache, [table], [past], [count], torch.device("cpu"))
        ids = TOKENS[:, past : past + count]
        with forward_context(NoHop(), batch):
            logits.append(model(ids, position_ids=batch.positions[None], use_cache=False).logits)
        past += count
    return torch.cat(logits, dim=1), spec


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_latents_give_the_logits_of_expanded_keys_and_values(architecture: str):
    """Chunks and decode over cached latents agree with transformers' single pass; each layer caches R + Dr per token."""
    with quiet_transformers():
        model = model_of(architecture)
        expected = model(TOKENS, use_cache=False).logits
        model.set_attn_implementation(paged.NAME)
        latent.cache_latents(model)
        logits, spec = served(model)
    assert (logits - expected).abs().max() < 1e-6 * expected.abs().max() * len(spec.layers) * HEADS
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
    assert spec.bytes_per_token == len(spec.layers) * (RANK + ROTATED) * 4


def test_half_precision_is_no_worse_than_the_expanded_form():
    """In bf16 the absorbed form is at most a quarter further from the fp32 logits than the expanded form."""
    model = model_of("deepseek_v3")
    expected = model(TOKENS, use_cache=False).logits
    model = model.to(torch.bfloat16)
    model.set_attn_implementation(paged.NAME)
    expanded, _ = served(model)
    latent.cache_latents(model)
    absorbed, _ = served(model)
    assert (absorbed - expected).norm() < 1.25 * (expanded - expected).norm()


def test_the_absorbed_weights_are_views():
    """Both halves are views of kv_b_proj's storage, so absorbing costs no memory."""
    model = model_of("deepseek_v3")
    projection = model.model.layers[0].self_attn.kv_b_proj.weight
    found = latent.latent_of(model.model.layers[0].self_attn)
    for half in (found.key, found.value):
        assert half.untyped_storage().data_ptr() == projection.untyped_storage().data_ptr()
    assert found.key.shape == (HEADS, UNROTATED, RANK)
    assert found.value.shape == (HEADS, VALUE, RANK)


def test_an_expansion_of_another_kind_is_left_expanded(caplog: pytest.LogCaptureFixture):
    """A layer whose keys are not the latent times kv_b_proj caches expanded keys; a warning gives the cost."""
    model = model_of("deepseek_v3")
    for layer in model.model.layers:

        def halved(c: torch.Tensor, rotated: torch.Tensor, expand: Any = layer.self_attn.expand_kv) -> Any:
            key, value = expand(c, rotated)
            return key * 0.5, value

        layer.self_attn.expand_kv = halved
    expected = model(TOKENS, use_cache=False).logits
    model.set_attn_implementation(paged.NAME)
    with caplog.at_level(logging.WARNING):
        latent.cache_latents(model)
    logits, spec = served(model)
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    assert spec.bytes_per_token == LAYERS * HEADS * (UNROTATED + ROTATED + VALUE) * 4
    assert [record.getMessage() for record in caplog.records] == [
        "2 layers cache expanded keys and values, over 3.7 times their latent "
        "(DeepseekV3Attention: its keys and values are not its latent times kv_b_proj)"
    ]


def test_deepseek_v3_keeps_70_kilobytes_a_token():
    """With the published widths a token takes 1,152 bytes per layer in bf16: 70,272 in all 61 layers, not 4,997,120."""
    published = {"num_attention_heads": 128, "num_key_value_heads": 128, "kv_lora_rank": 512}
    widths = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    model = model_of("deepseek_v3", torch.bfloat16, **published, **widths, num_hidden_layers=1)
    model.set_attn_implementation(paged.NAME)
    assert probed(model).bytes_per_token * 61 == 4_997_120
    latent.cache_latents(model)
    assert probed(model).bytes_per_token * 61 == 70_272


def test_an_indexer_is_refused():
    """DeepSeek-V3.2 without a prepared indexer is refused, since its tokens would be wrong."""
    model = model_of("deepseek_v32", index_n_heads=2, index_head_dim=16, index_topk=8)
    model.set_attn_implementation(paged.NAME)
    shape = ModelShape("deepseek_v32", 1, 4, 2, ExpertMLP(64, 24), "float32", 320, 2048)
    with pytest.raises(CheckpointError, match=r"deepseek_v32: its layers attend to tokens that an indexer .* picks"):
        discover_cache_spec(model, shape)
