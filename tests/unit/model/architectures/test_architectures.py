"""Every architecture in one process: trunk and experts against the reference; everything found is served or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moiety.errors import CheckpointError
from moiety.model.architectures.definitions import DEFINITIONS
from moiety.model.architectures.gating_description import gating_of
from moiety.model.architectures.supported import (
    REFUSED,
    nearest_hint,
    seam_architectures,
    served_architectures,
    served_through,
)
from moiety.model.architectures.transformers_model import experts_modules, meta_model, towers
from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.experts.derive import derive_layout
from moiety.model.seam import forward_context
from moiety.model.trunk.read import load_trunk
from moiety.router.attention import paged
from moiety.router.attention.step_batch import StepBatch
from moiety.router.cache.blocks import BlockTable
from moiety.router.cache.kv_cache import KVCache
from moiety.router.trunk import prepare_trunk
from moiety.synthetic import tiny_model, tiny_names, write_tiny
from moiety.synthetic.write import published_class, tiny_config
from moiety.tools.parity.parity import reference_model
from support.architectures import CORE, ENCODER_DECODERS

REFERENCES = Path(__file__).parents[3] / "parity" / "references.py"
# Adapters, definitions, text of multimodal checkpoints, an unusual gate. All the others together are slow.
QUICK = {*DEFINITIONS, "dbrx", "llama4", "longcat_flash", "qwen3_vl_moe", "phimoe"}
PROMPT = torch.randint(3, 320, (1, 40), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in tiny_names()
        if name not in CORE + ENCODER_DECODERS  # in `trunk/test_trunk_parity.py` and `trunk/test_encoder_decoder.py`
    ],
)
def test_router_and_slices_are_the_reference(open_tiny, make_experts, name: str):
    """A trunk with paged attention and experts in two slices together compute the reference's logits."""
    checkpoint, layout = open_tiny(name)
    reference = reference_model(str(checkpoint.path), torch.float32, REFERENCES)
    router = load_trunk(checkpoint, layout, torch.float32, "cpu", paged.NAME)
    cache, table = KVCache(prepare_trunk(router, layout.shape), 1 << 24, torch.device("cpu")), BlockTable()
    cache.grow(table, PROMPT.shape[1])
    batch = StepBatch.build(cache, [table], [0], [PROMPT.shape[1]], torch.device("cpu"))
    with torch.inference_mode(), forward_context(make_experts(checkpoint, layout), batch):
        found = router(PROMPT, position_ids=batch.positions[None], use_cache=False).logits
        expected = reference(PROMPT).logits
    scale = expected.abs().max()
    assert scale > 0.01
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=2e-5)


def test_everything_found_is_served_or_refused_by_name():
    """Every class found behind the experts interface is served, or has a reason in REFUSED."""
    found = seam_architectures()
    assert len(found) > 60
    for name in sorted(found - REFUSED.keys()):
        model = meta_model(published_class(config := tiny_config(name, tiny_model(name).settings)), config)
        assert experts_modules(model), name
    assert all(reason and not reason.endswith(".") for reason in REFUSED.values())
    assert not REFUSED.keys() - found, "nothing of that name is left in transformers"


def test_every_way_is_counted_once():
    """An architecture is served in one way: adapters and definitions are not also found behind the interface."""
    adapted = {name for name in served_architectures() if served_through(name) == "adapter"}
    assert not adapted & seam_architectures()
    assert not DEFINITIONS.keys() & (seam_architectures() | adapted)
    assert {served_through(name) for name in served_architectures()} == {"seam", "adapter", "definition"}


@pytest.mark.parametrize(
    ("architecture", "gating"),
    [
        ("mixtral", "softmax, top-k"),
        ("gpt_oss", "top-k, softmax"),
        ("deepseek_v2", "softmax, group-limited top-k"),
        ("deepseek_v3", "sigmoid + bias, group-limited top-k"),
        ("llama4", "top-k, sigmoid"),
        ("phimoe", "SparseMixer, top-2"),
        ("grok-1", "softmax, top-k"),
    ],
)
def test_gating_is_read_off_the_source(architecture: str, gating: str):
    """The gating that `moiety models` prints is that of the architecture's paper."""
    assert gating_of(architecture) == gating


def test_towers_are_never_built_or_read(open_tiny):
    """The trunk of a multimodal checkpoint holds only the language model."""
    checkpoint, layout = open_tiny("qwen3_vl_moe")
    assert any(".visual." in name for name in checkpoint.tensors)
    router = load_trunk(checkpoint, layout, torch.float32)
    assert not towers(router)
    assert not any("visual" in name for name, _ in router.named_parameters())


def test_dbrx_rotates_by_its_published_base(tmp_path: Path):
    """DBRX's rope_theta is read from attn_config, where transformers does not look for it."""
    attention_config = {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1234.0}
    checkpoint = Checkpoint.open(write_tiny("dbrx", tmp_path, attn_config=attention_config))
    router = load_trunk(checkpoint, derive_layout(checkpoint), torch.float32)
    assert router.config.rope_parameters["rope_theta"] == 1234.0
    assert router.transformer.rotary_emb.inv_freq[1] == pytest.approx(1234.0 ** (-2 / 16))


def test_zero_experts_of_longcat_stay_on_the_router(open_tiny, make_experts):
    """A token's choice of a zero expert reaches no expert replica: the hop gets -1."""
    checkpoint, layout = open_tiny("longcat_flash")
    router = load_trunk(checkpoint, layout, torch.float32, "cpu", "eager")
    experts, seen = make_experts(checkpoint, layout), []

    class Watched:
        def submit(self, layer, hidden, index):
            seen.append(index)
            return experts.submit(layer, hidden, index)

    with torch.inference_mode(), forward_context(Watched()):
        router(PROMPT, use_cache=False)
    chosen = torch.stack(seen)
    assert int(chosen.max()) < layout.shape.experts
    assert bool((chosen == -1).any())
    assert bool((chosen >= 0).any())


@pytest.mark.parametrize("architecture", ["beam", "inkling_text"])
def test_a_refusal_says_what_is_missing_and_what_is_near(tmp_path: Path, architecture: str):
    """A refusal names the architecture, what it needs and the nearest supported one, before any weight is read."""
    checkpoint = Checkpoint.open(write_tiny(architecture, tmp_path))
    for shard in tmp_path.glob("*.safetensors"):
        shard.unlink()
    with pytest.raises(CheckpointError) as refusal:
        derive_layout(checkpoint)
    message = str(refusal.value)
    assert f"architecture {architecture}" in message
    assert REFUSED[architecture] in message
    assert nearest_hint(architecture) in message


def test_a_missing_trunk_weight_is_named_before_any_is_read(tmp_path: Path):
    """Names and shapes are enough to refuse a checkpoint: no weight file needs to exist."""
    folder = write_tiny("qwen3_moe", tmp_path)
    checkpoint = Checkpoint.open(folder)
    tensors = {name: entry for name, entry in checkpoint.tensors.items() if name != "model.layers.2.mlp.gate.weight"}
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    with pytest.raises(CheckpointError, match=r"missing keys: model\.layers\.2\.mlp\.gate\.weight"):
        derive_layout(Checkpoint(checkpoint.path, checkpoint.config, checkpoint.shards, tensors))


def test_minimax_with_a_window_is_refused(tmp_path: Path):
    """A sliding window in MiniMax is refused, because its layers' type is full attention and would hide the window."""
    with pytest.raises(CheckpointError, match="sliding_window 16: windows in its full attention"):
        derive_layout(Checkpoint.open(write_tiny("minimax", tmp_path, sliding_window=16)))
