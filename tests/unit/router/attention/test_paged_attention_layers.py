"""The ragged attention function against a naive twin, token by token, and against transformers' sdpa."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_support import NoHop
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from moiety.model.seam import forward_context
from moiety.router.attention.paged import attend
from moiety.router.attention.step_batch import StepBatch
from moiety.router.cache.blocks import BlockTable
from moiety.router.cache.cache_spec import CacheSpec, LayerSpec
from moiety.router.cache.kv_cache import KVCache

HEADS, GROUPS, WIDTH, VALUE_WIDTH = 4, 2, 8, 6
LENGTHS = {"a": 1, "b": 13, "c": 7}  # tokens of each sequence: one, more than every window below, about a window
LAYERS = 2


class Layers:
    """Holds random queries, keys and values of whole sequences for each layer."""

    def __init__(self, heads: int = HEADS, groups: int = GROUPS, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)

        def random(heads: int, count: int, width: int) -> torch.Tensor:
            return torch.randn(heads, count, width, generator=generator)

        self.heads, self.groups = heads, groups
        self.of = {
            (name, layer): (random(heads, n, WIDTH), random(groups, n, WIDTH), random(groups, n, VALUE_WIDTH))
            for name, n in LENGTHS.items()
            for layer in range(LAYERS)
        }

    def run(self, steps: list[dict[str, int]], config: Any, **options: Any) -> dict[tuple[str, int], torch.Tensor]:
        """Runs steps of {sequence: tokens}; returns (sequence, layer) -> [H, n, Dv]."""
        spec = CacheSpec({i: LayerSpec(self.groups, WIDTH, VALUE_WIDTH, torch.float32) for i in range(LAYERS)})
        cache = KVCache(spec, 1 << 20, torch.device("cpu"), block_tokens=4)
        tables = {name: BlockTable() for name in LENGTHS}
        past = dict.fromkeys(LENGTHS, 0)
        outputs: dict[tuple[str, int], list[torch.Tensor]] = {key: [] for key in self.of}
        for step in steps:
            for name, count in step.items():
                cache.grow(tables[name], past[name] + count)
            behind = [past[name] for name in step]
            batch = StepBatch.build(
                cache, [tables[name] for name in step], behind, list(step.values()), torch.device("cpu")
            )
            for layer in range(LAYERS):
                packed = [
                    torch.cat(
                        [self.of[name, layer][i][:, past[name] : past[name] + count] for name, count in step.items()], 1
                    )[None]
                    for i in range(3)
                ]
                module = SimpleNamespace(layer_idx=layer, config=config)
                with forward_context(NoHop(), batch):
                    output, _ = attend(module, *packed, None, **options)
                assert output.shape == (1, sum(step.values()), self.heads, VALUE_WIDTH)
                for name, rows in zip(step, output[0].split(list(step.values())), strict=True):
                    outputs[name, layer].append(rows.transpose(0, 1))
            for name, count in step.items():
                past[name] += count
        assert past == LENGTHS
        return {key: torch.cat(parts, 1) for key, parts in outputs.items()}


def naive(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    window: int | None = None,
    chunk: int | None = None,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
    scaling: float = WIDTH**-0.5,
) -> torch.Tensor:
    """Computes attention one head and one token at a time; returns [H, n, Dv]."""
    out = torch.zeros(query.shape[0], query.shape[1], value.shape[-1])
    for head in range(query.shape[0]):
        group = head // (query.shape[0] // key.shape[0])
        for token in range(query.shape[1]):
            seen = [
                position
                for position in range(token + 1)
                if (window is None or position > token - window)
                and (chunk is None or position // chunk == token // chunk)
            ]
            scores = key[group, seen] @ query[head, token] * scaling
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:
                scores = torch.cat([scores, sinks[head : head + 1]])
            out[head, token] = scores.softmax(0)[: len(seen)] @ value[group, seen]
    return out


STEPS = {
    "whole prompts at once": [dict(LENGTHS)],
    "chunks beside decode": [{"c": 5, "b": 4}, {"a": 1, "b": 6, "c": 1}, {"c": 1, "b": 3}],
    "token by token": [{name: 1 for name, n in LENGTHS.items() if step < n} for step in range(max(LENGTHS.values()))],
}
PLAIN = SimpleNamespace()
VARIANTS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "full": (PLAIN, {}, {}),
    "scaled": (PLAIN, {"scaling": 0.5}, {"scaling": 0.5}),
    "window": (PLAIN, {"sliding_window": 4}, {"window": 4}),
    "window from the config": (
        SimpleNamespace(layer_types=["sliding_attention"] * 2, sliding_window=4),
        {},
        {"window": 4},
    ),
    "chunked": (SimpleNamespace(layer_types=["chunked_attention"] * 2, attention_chunk_size=5), {}, {"chunk": 5}),
    "soft caps": (PLAIN, {"softcap": 2.0}, {"softcap": 2.0}),
    "sinks": (PLAIN, {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0])}, {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])}),
    "sinks and window": (
        PLAIN,
        {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0]), "sliding_window": 3},
        {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0]), "window": 3},
    ),
}


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_is_its_naive_twin(variant: tuple[Any, dict[str, Any], dict[str, Any]], steps: Any):
    """However sequences are split into steps and packed, each token sees only its own past."""
    config, options, twin = variant
    layers = Layers()
    for key, output in layers.run(steps, config, **options).items():
        torch.testing.assert_close(output, naive(*layers.of[key], **twin), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (4, 1)])
def test_grouped_queries_share_keys_as_in_transformers(heads: int, groups: int):
    """Multi-head, grouped and multi-query attention equal transformers' sdpa on each sequence alone."""
    layers = Layers(heads, groups)
    module = SimpleNamespace(num_key_value_groups=heads // groups, is_causal=True)
    for key, output in layers.run(STEPS["chunks beside decode"], PLAIN).items():
        query, keys, values = (part[None] for part in layers.of[key])
        expected, _ = sdpa_attention_forward(module, query, keys, values, None, is_causal=True)
        torch.testing.assert_close(output.transpose(0, 1), expected[0], atol=1e-5, rtol=1e-5)


def test_a_layer_type_overrides_the_argument():
    """Models pass the window to every layer; layers of type full attention ignore it."""
    config = SimpleNamespace(layer_types=["full_attention", "sliding_attention"], sliding_window=4)
    layers = Layers()
    for (name, layer), output in layers.run(STEPS["whole prompts at once"], config, sliding_window=4).items():
        expected = naive(*layers.of[name, layer], window=4 if layer else None)
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def test_it_needs_a_batch():
    """Outside of a forward with a batch, the error names what is missing."""
    module = SimpleNamespace(layer_idx=0, config=PLAIN)
    one = torch.zeros(1, 1, 1, 1)
    with pytest.raises(RuntimeError, match=r"outside of forward_context\(backend, batch\)"):
        attend(module, one, one, one, None)
    with forward_context(NoHop()), pytest.raises(RuntimeError, match="needs a batch"):
        attend(module, one, one, one, None)
