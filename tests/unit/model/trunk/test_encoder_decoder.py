"""Switch Transformers and NLLB-MoE, split into trunk and experts, against transformers and against NLLB's papers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from nllb_reference import NllbReference
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM

from moiety.errors import CheckpointError, HopFailed, NoHolder
from moiety.model.architectures.adapters.nllb import Nllb
from moiety.model.architectures.adapters.switch import Switch
from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.experts.cached import expert_layout
from moiety.model.experts.derive import derive_layout
from moiety.model.seam import forward_context
from moiety.model.trunk.encoder_decoder import DecoderStart
from moiety.model.trunk.read import load_trunk
from moiety.router.attention import paged
from moiety.router.attention.step_batch import CrossAttentionBatch, StepBatch
from moiety.router.cache.blocks import BlockTable
from moiety.router.cache.kv_cache import KVCache
from moiety.router.trunk import prepare_trunk
from moiety.synthetic import write_tiny
from moiety.tools.parity import encoder_decoder
from support.architectures import ENCODER_DECODERS

CPU = torch.device("cpu")
NEW_TOKENS = 12


def plain(checkpoint: Checkpoint) -> Any:
    """Loads the checkpoint in transformers, with its NLLB-MoE corrected."""
    model = AutoModelForSeq2SeqLM.from_pretrained(checkpoint.path, dtype=torch.float32, local_files_only=True).eval()
    model.generation_config.eos_token_id = None
    return encoder_decoder.correct_experts(model)


def random_prompts(*lengths: int) -> list[list[int]]:
    """Returns random token ids without special tokens."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(6, 320, (length,), generator=generator).tolist() for length in lengths]


class BatchedModel:
    """A trunk with its own KV cache, for several sequences in one row."""

    def __init__(self, checkpoint: Checkpoint, layout: Any, experts: Any, prompts: Sequence[Sequence[int]]):
        self.model = load_trunk(checkpoint, layout, torch.float32, attention=paged.NAME)
        self.experts, self.prompts = experts, prompts
        self.cache = KVCache(prepare_trunk(self.model, layout.shape), 1 << 22, CPU)
        self.tables, self.cross_tables = [BlockTable() for _ in prompts], [BlockTable() for _ in prompts]
        for prompt, table, cross_table in zip(prompts, self.tables, self.cross_tables, strict=True):
            self.cache.grow(table, NEW_TOKENS + 1)
            self.cache.grow(cross_table, len(prompt))

    @torch.inference_mode()
    def step(
        self, tokens: Sequence[Sequence[int]], past: int, *, encode: bool, wanted: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Returns the logits of these tokens of each sequence, after `past` earlier ones."""
        counts = [len(sequence) for sequence in tokens]
        new = [encode] * len(counts)
        cross_batch = CrossAttentionBatch.build(self.cache, self.prompts, self.cross_tables, new, counts, CPU)
        batch = StepBatch.build(self.cache, self.tables, [past] * len(counts), counts, CPU, cross_batch)
        with forward_context(self.experts, batch):
            logits: torch.Tensor = self.model(
                input_ids=torch.tensor([[token for sequence in tokens for token in sequence]]),
                position_ids=batch.positions[None],
                logits_to_keep=None if wanted is None else torch.tensor(wanted),
            ).logits[0]
        return logits


@pytest.mark.parametrize("architecture", ENCODER_DECODERS)
def test_tokens_of_several_prompts_at_once_are_those_of_transformers(open_tiny, make_experts, architecture: str):
    """Prompts encoded in one row and decoded token by token, then at once, give transformers' tokens for each alone.

    The prompts are long enough that experts exceed their capacity, each with tokens of one prompt only.
    """
    checkpoint, layout = open_tiny(architecture)
    prompts = random_prompts(3, 40, 17, 60)
    expected_outputs, expected = encoder_decoder.generate(plain(checkpoint), prompts, NEW_TOKENS)
    batched = BatchedModel(checkpoint, layout, make_experts(checkpoint, layout), prompts)
    worst = 0.0
    outputs = [[output[0]] for output in expected_outputs]
    for past in range(NEW_TOKENS):
        logits = batched.step([output[-1:] for output in outputs], past, encode=past == 0)
        for output, row, reference in zip(outputs, logits, expected, strict=True):
            output.append(int(row.argmax()))
            worst = max(worst, float((row - reference[past]).abs().max()))
    assert outputs == expected_outputs
    at_once = batched.step([output[:-1] for output in outputs], 0, encode=True).split(NEW_TOKENS)
    worst = max(worst, *(float((a - b[:-1]).abs().max()) for a, b in zip(at_once, expected, strict=True)))
    assert worst <= 1e-4
    ends = [(n + 1) * NEW_TOKENS - 1 for n in range(len(prompts))]
    wanted = batched.step([output[:-1] for output in outputs], 0, encode=False, wanted=ends)
    assert wanted.argmax(-1).tolist() == [output[-1] for output in outputs], "only the wanted logits"


@pytest.mark.parametrize("architecture", ENCODER_DECODERS)
def test_a_prompt_is_encoded_as_if_alone(open_tiny, make_experts, architecture: str):
    """Other prompts in the row do not change a prompt's keys and values: they do not use its experts' capacity."""
    checkpoint, layout = open_tiny(architecture)
    prompts = random_prompts(60, 17, 60)
    batched = BatchedModel(checkpoint, layout, make_experts(checkpoint, layout), prompts)
    alone = BatchedModel(checkpoint, layout, make_experts(checkpoint, layout), prompts[1:2])
    start = [[1]]
    batched.step(start * 3, 0, encode=True)
    alone.step(start, 0, encode=True)
    for layer in batched.cache.spec.layers:
        for pool, other in zip(batched.cache.layer(layer), alone.cache.layer(layer), strict=True):
            in_batch = pool[batched.cross_tables[1].held].transpose(1, 2).flatten(0, 1)[:17]
            by_itself = other[alone.cross_tables[0].held].transpose(1, 2).flatten(0, 1)[:17]
            assert torch.allclose(in_batch, by_itself, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ENCODER_DECODERS)
def test_lost_experts_of_a_prompt_name_its_sequence(open_tiny, make_experts, architecture: str):
    """A hop that fails for tokens of a prompt raises HopFailed with tokens of that sequence's output."""
    checkpoint, layout = open_tiny(architecture)
    experts = make_experts(checkpoint, layout)

    class Failing:
        """Fails for the second prompt's last token and the third prompt's first token."""

        def submit(self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor) -> Any:
            return self

        def result(self) -> torch.Tensor:
            raise HopFailed([3 + 9 - 1, 3 + 9], NoHolder(0, [1], 1.0))

    batched = BatchedModel(checkpoint, layout, experts, random_prompts(3, 9, 5))
    batched.experts = Failing()
    with pytest.raises(HopFailed) as failed:
        batched.step([[1], [1], [1]], 0, encode=True)
    assert failed.value.tokens == [1, 2]


def test_nllb_agrees_with_its_papers(open_tiny, make_experts):
    """A forward written from the papers has the logits of the split model, and of transformers with our correction.

    Uncorrected transformers, which gives every token to experts 0 and 1, has others. If a release fixes that, this test
    fails and the correction can go.
    """
    checkpoint, layout = open_tiny("nllb-moe")
    (prompt,) = random_prompts(40)
    (output,), (logits,) = encoder_decoder.generate(plain(checkpoint), [prompt], NEW_TOKENS)
    weights = {name: tensor for shard in checkpoint.shards for name, tensor in load_file(shard).items()}
    expected = NllbReference(weights, checkpoint.config).logits(prompt, output)
    assert (logits - expected).abs().max() <= 1e-4
    batched = BatchedModel(checkpoint, layout, make_experts(checkpoint, layout), [prompt])
    assert (batched.step([output], 0, encode=True) - expected).abs().max() <= 1e-4
    uncorrected = AutoModelForSeq2SeqLM.from_pretrained(checkpoint.path, dtype=torch.float32, local_files_only=True)
    assert (encoder_decoder.decode(uncorrected.eval(), prompt, output) - expected).abs().max() > 0.1


@contextmanager
def in_an_encoder(lengths: Sequence[int]) -> Iterator[None]:
    """Runs the block as a pass whose row holds prompts of these lengths."""
    with forward_context(None) as context:  # type: ignore[arg-type]  # nothing is submitted
        context.encoding = tuple(lengths)
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("capacity", [1, 3, 64])
def test_switch_routes_as_transformers_does(open_tiny, capacity: int, dtype: torch.dtype):
    """Prompts in one row are routed, weighted and cut off at capacity as transformers does for each alone."""
    checkpoint, _ = open_tiny("switch_transformers")
    block = plain(checkpoint).encoder.block[1].layer[1].mlp
    block.router.expert_capacity = capacity
    hidden, lengths = torch.randn(50, 64, generator=torch.Generator().manual_seed(1)).to(dtype), (7, 30, 13)
    with in_an_encoder(lengths), torch.no_grad():
        chosen, weights = Switch().route(block, hidden)
    for ids, weight, rows in zip(chosen.split(lengths), weights.split(lengths), hidden.split(lengths), strict=True):
        with torch.no_grad():
            dispatch, probabilities, _ = block.router(rows[None])
        assert torch.equal(ids >= 0, dispatch[0].sum(-1, keepdim=True) > 0)
        assert torch.equal(ids.clamp(min=0), dispatch[0].argmax(-1, keepdim=True))
        assert torch.equal(weight, probabilities[0])


@pytest.mark.parametrize("fraction", [0.2, 1.0, -1.0])
@pytest.mark.parametrize("prioritised", [False, True], ids=["in order", "by importance"])
@pytest.mark.parametrize("before", [False, True], ids=["normalised after", "normalised before"])
def test_nllb_routes_as_transformers_does(open_tiny, before: bool, prioritised: bool, fraction: float):
    """The gates of each prompt's tokens are those of transformers' router for that prompt alone, under every option."""
    checkpoint, _ = open_tiny("nllb-moe")
    block = plain(checkpoint).model.encoder.layers[1].ffn
    block.router.normalize_router_prob_before_dropping = before
    block.router.batch_prioritized_routing = prioritised
    block.router.moe_eval_capacity_token_fraction = fraction
    block.router.expert_capacity = 4
    hidden, lengths = torch.randn(50, 64, generator=torch.Generator().manual_seed(1)), (7, 30, 13)
    with in_an_encoder(lengths), torch.no_grad():
        chosen, weights = Nllb().route(block, hidden)
    for ids, weight, rows in zip(chosen.split(lengths), weights.split(lengths), hidden.split(lengths), strict=True):
        router = copy.deepcopy(block.router)
        with torch.no_grad():
            _, gates, _ = router(rows)
        found = torch.zeros_like(gates).scatter_add(1, ids.clamp(min=0), weight.where(ids >= 0, 0))
        assert torch.allclose(found, gates * (1 - block.experts.moe_token_dropout), rtol=1e-6, atol=1e-7)


def test_capacity_does_not_limit_decoder_tokens(open_tiny):
    """Decoder tokens are routed one by one, as in a cached decode: sixty for one expert do not exceed its capacity."""
    checkpoint, _ = open_tiny("switch_transformers")
    block = plain(checkpoint).decoder.block[1].layer[2].mlp
    with forward_context(None), torch.no_grad():  # type: ignore[arg-type]  # nothing is submitted
        chosen, _ = Switch().route(block, torch.ones(60, 64))
    assert (chosen >= 0).all()


def test_random_second_experts_are_refused(tmp_path):
    """NLLB's training-time policies, which draw experts at random, are refused by name before a weight is read."""
    checkpoint = Checkpoint.open(write_tiny("nllb-moe", tmp_path, second_expert_policy="random"))
    with pytest.raises(CheckpointError, match=r"architecture nllb-moe.*second_expert_policy 'random'"):
        expert_layout(checkpoint)


def test_experts_are_found_under_their_published_names(open_tiny):
    """The layout has the encoder's layers before the decoder's, one tensor per expert and matrix, and NLLB's biases."""
    _, switch_layout = open_tiny("switch_transformers")
    assert [layer.module for layer in switch_layout.layers] == [
        "encoder.block.1.layer.1.mlp.experts",
        "encoder.block.3.layer.1.mlp.experts",
        "decoder.block.1.layer.2.mlp.experts",
        "decoder.block.3.layer.2.mlp.experts",
    ]
    first = switch_layout.layers[0].sources["gate_up"]
    assert first == ("encoder.block.1.layer.1.mlp.experts.expert_{expert}.wi.weight",)
    assert (switch_layout.shape.top_k, switch_layout.shape.mlp.activation, switch_layout.shape.mlp.gated) == (
        1,
        "relu",
        False,
    )
    _, nllb_layout = open_tiny("nllb-moe")
    last = nllb_layout.layers[-1].sources
    assert last["down_bias"] == ("model.decoder.layers.3.ffn.experts.expert_{expert}.fc2.bias",)
    assert (nllb_layout.shape.top_k, nllb_layout.shape.max_context) == (2, 512)


def test_a_missing_expert_is_named(open_tiny):
    """A checkpoint that lacks one expert's tensor raises an error that names the tensor."""
    checkpoint, _ = open_tiny("switch_transformers")
    lost = "decoder.block.3.layer.2.mlp.experts.expert_5.wo.weight"
    tensors = {name: entry for name, entry in checkpoint.tensors.items() if name != lost}
    with pytest.raises(CheckpointError, match=f"no tensor in it becomes {lost}"):
        derive_layout(replace(checkpoint, tensors=tensors))


def test_the_start_of_a_decoder_is_read_from_its_configs(open_tiny, tmp_path):
    """generation_config.json takes precedence over config.json; a decoder-only model has no DecoderStart."""
    assert DecoderStart.of(open_tiny("mixtral")[0]) is None
    assert DecoderStart.of(open_tiny("nllb-moe")[0]) == DecoderStart(2)
    folder = write_tiny("nllb-moe", tmp_path)
    (folder / "generation_config.json").write_text('{"decoder_start_token_id": 7, "forced_bos_token_id": 5}')
    assert DecoderStart.of(Checkpoint.open(folder)) == DecoderStart(7, 5)
