"""Random checkpoints have published names, a working tokenizer, and the same bytes for the same seed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.checkpoint.revision import revision_of
from moiety.model.checkpoint.tokenizer import open_tokenizer
from moiety.synthetic import write_tiny
from support.architectures import CORE


@pytest.fixture(scope="session")
def open_tiny(tiny: Callable[[str], str]) -> Callable[[str], Checkpoint]:
    """Opens an architecture's tiny checkpoint, written on first use."""
    return lambda architecture: Checkpoint.open(tiny(architecture))


@pytest.mark.parametrize("architecture", CORE)
def test_names_are_those_save_pretrained_writes(open_tiny, architecture: str, tmp_path: Path):
    """transformers saves a model of the same config with the same tensor names and shapes."""
    checkpoint = open_tiny(architecture)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint.path))
    model.save_pretrained(tmp_path)
    saved = Checkpoint.open(tmp_path)
    assert {name: entry.shape for name, entry in checkpoint.tensors.items()} == {
        name: entry.shape for name, entry in saved.tensors.items()
    }


@pytest.mark.parametrize("architecture", CORE)
def test_every_weight_is_loaded(open_tiny, architecture: str):
    """Plain transformers finds every weight that it needs, and no unknown weight."""
    _, report = AutoModelForCausalLM.from_pretrained(
        open_tiny(architecture).path, local_files_only=True, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("deepseek_v3", "model.layers.1.mlp.gate.e_score_correction_bias"),
        ("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj_bias"),
        ("gpt_oss", "model.layers.0.mlp.experts.down_proj_bias"),
        ("gpt_oss", "model.layers.0.self_attn.sinks"),
    ],
)
def test_nothing_is_left_at_zero(open_tiny, architecture: str, name: str):
    """Biases, sinks and correction terms are not zero: zeros would hide that one is ignored."""
    model = AutoModelForCausalLM.from_pretrained(open_tiny(architecture).path, local_files_only=True)
    assert model.state_dict()[name].abs().min() > 0


@pytest.mark.parametrize("text", ["The router runs attention.", "Ünïcode, 🙂 and\nnewlines\t", ""])
def test_any_text_survives_the_tokenizer(open_tiny, text: str):
    """AutoTokenizer encodes any text to ids within the vocabulary, and decodes them to the same text."""
    tokenizer = AutoTokenizer.from_pretrained(open_tiny("mixtral").path, local_files_only=True)
    ids = tokenizer(text).input_ids
    assert all(3 <= token < 320 for token in ids)
    assert tokenizer.decode(ids) == text


def test_the_tokenizer_has_what_serving_needs(open_tiny):
    """The tokenizer's special tokens agree with the config, and its chat template renders."""
    checkpoint = open_tiny("mixtral")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.path, local_files_only=True)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    assert checkpoint.config["eos_token_id"] == 1
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "user: hi\nassistant:"


def test_a_seed_is_a_checkpoint(open_tiny, tmp_path: Path):
    """The same seed gives the same revision, and another seed another one."""
    same = Checkpoint.open(write_tiny("mixtral", tmp_path / "same"))
    other = Checkpoint.open(write_tiny("mixtral", tmp_path / "other", seed=1))
    assert revision_of(same) == revision_of(open_tiny("mixtral")) != revision_of(other)


def test_overrides_reach_the_config(tmp_path: Path):
    """Overrides set sizes and dtype; a vocabulary below the tokenizer's and an unknown architecture are refused."""
    folder = write_tiny("qwen3_moe", tmp_path, dtype="bfloat16", num_hidden_layers=2, num_experts=5)
    checkpoint = Checkpoint.open(folder)
    assert {entry.dtype for entry in checkpoint.tensors.values()} == {"BF16"}
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 2
    assert "model.layers.1.mlp.experts.4.up_proj.weight" in checkpoint.tensors
    with pytest.raises(ValueError, match="vocab_size 256: must be at least 320"):
        write_tiny("mixtral", tmp_path, vocab_size=256)
    with pytest.raises(ValueError, match=r"'bert': must be one of .*mixtral"):
        write_tiny("bert", tmp_path)


def test_large_ones_are_written_quickly(tmp_path: Path):
    """37 M parameters are written in less than 10 s, so that large benchmark checkpoints take little time."""
    start = time.monotonic()
    folder = write_tiny("mixtral", tmp_path, dtype="bfloat16", hidden_size=512, intermediate_size=768, head_dim=64)
    assert sum(torch.Size(entry.shape).numel() for entry in Checkpoint.open(folder).tensors.values()) > 37_000_000
    assert time.monotonic() - start < 10


def test_a_chat_checkpoint(tmp_path: Path):
    """`chat=True` changes the tokenizer only: the weights and config stay, and turns end the output; no encoder-decoders."""
    plain, chat = write_tiny("qwen3_moe", tmp_path / "plain"), write_tiny("qwen3_moe", tmp_path / "chat", chat=True)
    for name in ("config.json", "model-00001-of-00001.safetensors"):
        assert (plain / name).read_bytes() == (chat / name).read_bytes()
    tokenizer, ends = open_tokenizer(str(chat))
    assert len(tokenizer) == len(open_tokenizer(str(plain))[0]) == 320
    assert ends == (1, tokenizer.convert_tokens_to_ids("<|im_end|>"))
    text = '<|im_start|>x<tool_call>{"a": "Ünïcode 🙂"}</tool_call><|im_end|>'
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == 'x<tool_call>{"a": "Ünïcode 🙂"}</tool_call>'
    with pytest.raises(ValueError, match="does not chat"):
        write_tiny("switch_transformers", tmp_path / "t5", chat=True)
