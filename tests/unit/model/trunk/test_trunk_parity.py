"""The split model (a trunk, and experts in two slices) against plain transformers."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from trunk_reference import PROMPT_LENGTHS, attention_of, greedy, prompt, reference

from moiety.core.expert_backend import PendingRows
from moiety.errors import CheckpointError
from moiety.model.architectures.transformers_model import experts_modules
from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.experts.cached import expert_layout
from moiety.model.seam import forward_context
from moiety.model.trunk.read import load_trunk
from moiety.synthetic import write_tiny
from support.architectures import CORE


@pytest.mark.parametrize("architecture", CORE)
def test_greedy_tokens_are_those_of_transformers(
    open_tiny, make_experts, architecture: str, record_property, capsys: pytest.CaptureFixture[str]
):
    """In fp32 every greedy token is the reference's, and logits agree within 1e-5; the largest error is reported."""
    checkpoint, layout = open_tiny(architecture)
    plain = reference(checkpoint)
    router = load_trunk(checkpoint, layout, torch.float32, attention=attention_of(architecture))
    worst = 0.0
    with forward_context(make_experts(checkpoint, layout)), torch.no_grad():
        for length in PROMPT_LENGTHS:
            expected = greedy(plain, prompt(length))
            assert torch.equal(greedy(router, prompt(length)), expected)
            worst = max(worst, (router(expected).logits - plain(expected).logits).abs().max().item())
    record_property("max_logit_error", worst)
    with capsys.disabled():
        print(f"\n{architecture}: max logit error {worst:.1e}", end=" ")
    assert worst <= 1e-5


def test_one_wrong_expert_changes_the_logits(open_tiny, make_experts):
    """The comparison above can fail: other weights in one expert of one layer change the logits."""
    checkpoint, layout = open_tiny("mixtral")
    router = load_trunk(checkpoint, layout, torch.float32)
    experts = make_experts(checkpoint, layout)
    with forward_context(experts), torch.no_grad():
        right = router(prompt(40)).logits
        experts.replace(2, 1, by=(2, 0))
        assert (router(prompt(40)).logits - right).abs().max() > 0.1


def test_an_unsupported_attention_is_named(open_tiny):
    """gpt-oss has attention sinks, which sdpa does not support: the error names the attention and the architecture."""
    with pytest.raises(CheckpointError, match=r"architecture gpt_oss.*scaled_dot_product_attention"):
        load_trunk(*open_tiny("gpt_oss"), torch.float32, attention="sdpa")


@pytest.mark.parametrize("architecture", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_bfloat16_logits_agree(open_tiny, make_experts, architecture: str):
    """In bf16, too, the split model's logits are equal to the bit: weights keep their dtype, and sums their order.

    Those of gpt-oss may differ by roundings: its matrices are published transposed, and a CPU without bf16 instructions sums
    transposed products in another order.
    """
    checkpoint, layout = open_tiny(architecture)
    attention = attention_of(architecture)
    router = load_trunk(checkpoint, layout, torch.bfloat16, attention=attention)
    with forward_context(make_experts(checkpoint, layout, torch.bfloat16)), torch.no_grad():
        logits = router(prompt(40)).logits
        expected = reference(checkpoint, torch.bfloat16)(prompt(40)).logits
    bound = 0.02 * float(expected.abs().max()) if architecture == "gpt_oss" else 0.0
    assert float((logits - expected).abs().max()) <= bound


@pytest.mark.parametrize("architecture", CORE)
def test_parameters_are_split_without_remainder(open_tiny, make_experts, architecture: str):
    """The trunk has every parameter but the experts', and the slices have those, with no byte more or less."""
    checkpoint, layout = open_tiny(architecture)
    plain = reference(checkpoint)
    in_experts = sum(p.nbytes for _, module in experts_modules(plain) for p in module.parameters())
    router = load_trunk(checkpoint, layout, torch.float32, attention=attention_of(architecture))
    assert all(not list(module.parameters()) for _, module in experts_modules(router))
    assert sum(p.nbytes for p in router.parameters()) == sum(p.nbytes for p in plain.parameters()) - in_experts
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in router.parameters()}
    assert sum(storages.values()) == sum(p.nbytes for p in router.parameters())
    held = make_experts(checkpoint, layout).held_bytes()
    per_expert = in_experts // (layout.shape.moe_layers * layout.shape.experts)
    assert all(held_bytes == experts * per_expert for experts, held_bytes in held)
    assert sum(held_bytes for _, held_bytes in held) == in_experts


def test_two_forwards_of_one_model_interleave(open_tiny, make_experts):
    """Two threads that run one model layer by layer in step, each with its own backend, each get the logits as if alone."""
    checkpoint, layout = open_tiny("deepseek_v3")
    router = load_trunk(checkpoint, layout, torch.float32)
    experts = make_experts(checkpoint, layout)
    barrier = threading.Barrier(2, timeout=20)

    class InStep:
        """Submits a layer, then waits until the other lane has submitted its own."""

        def __init__(self) -> None:
            self.tokens: list[int] = []

        def submit(self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor) -> PendingRows:
            self.tokens.append(hidden.shape[0])
            pending = experts.submit(layer, hidden, top_k_index)
            barrier.wait()
            return pending

    lanes = {length: InStep() for length in (5, 23)}
    logits: dict[int, torch.Tensor] = {}

    def forward(length: int) -> None:
        with forward_context(lanes[length]), torch.no_grad():
            logits[length] = router(prompt(length)).logits

    threads = [threading.Thread(target=forward, args=(length,)) for length in lanes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for length, lane in lanes.items():
        assert lane.tokens == [length] * layout.shape.moe_layers
        with forward_context(experts), torch.no_grad():
            assert torch.equal(logits[length], router(prompt(length)).logits)


def test_a_forward_without_a_backend_is_refused(open_tiny):
    """Running a trunk outside of forward_context raises an error."""
    checkpoint, layout = open_tiny("mixtral")
    with pytest.raises(RuntimeError, match="outside of forward_context"):
        load_trunk(checkpoint, layout, torch.float32)(prompt(3))


def test_a_missing_trunk_weight_is_named(tmp_path: Path):
    """A checkpoint that lacks a non-expert tensor is refused, so that no random values are served."""
    folder = write_tiny("mixtral", tmp_path)
    shard = next(folder.glob("*.safetensors"))
    tensors = load_file(shard)
    del tensors["model.norm.weight"]
    save_file(tensors, shard, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    del data["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(data))
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(CheckpointError, match=r"missing keys: model\.norm\.weight"):
        load_trunk(checkpoint, expert_layout(checkpoint), torch.float32)
