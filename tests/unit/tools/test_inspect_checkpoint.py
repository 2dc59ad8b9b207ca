"""`moiety inspect`: known sizes of published models, computed from configs and headers alone."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from full_size import write_hollow
from transformers import DeepseekV3Config, MixtralConfig

from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.synthetic import write_tiny
from moiety.tools.inspect_checkpoint import FLOOR, PEAK, inspect, lines, suggest

GIB = 1 << 30


def test_mixtral_has_its_published_size(tmp_path: Path):
    """Mixtral 8x7B: 46.7 B parameters, 12.9 B active, 32 layers of 8 experts of 3 x 4096 x 14336."""
    found = inspect(Checkpoint.open(write_hollow(tmp_path, MixtralConfig(dtype="bfloat16"), shards=19)))
    assert (found.layers, found.moe_layers, found.experts, found.top_k, found.shared_experts) == (32, 32, 8, 2, 0)
    assert found.parameters == pytest.approx(46.7e9, rel=1e-3)
    assert found.active_parameters == pytest.approx(12.88e9, rel=1e-3)
    assert found.expert_bytes == 2 * 3 * 4096 * 14336
    assert found.group_bytes(8) == 32 * found.expert_bytes
    assert found.group_bytes(3) == 3 * 32 * found.expert_bytes, "the largest of three groups holds three experts"
    assert found.router_bytes + found.group_bytes(1) == 2 * found.parameters


@pytest.mark.slow
def test_deepseek_v3_is_read_in_seconds(tmp_path: Path):
    """671 B parameters in 163 shards and 45,000 tensors: 37 B active, 256 experts and a shared one in 58 of 61 layers."""
    checkpoint = Checkpoint.open(write_hollow(tmp_path, DeepseekV3Config(dtype="bfloat16"), shards=163))
    began = time.monotonic()
    found = inspect(checkpoint, 80 * GIB)
    assert time.monotonic() - began < 20
    assert (found.layers, found.moe_layers, found.experts, found.top_k, found.shared_experts) == (61, 58, 256, 8, 1)
    assert found.parameters == pytest.approx(671e9, rel=1e-3)
    assert found.active_parameters == pytest.approx(37.5e9, rel=1e-2)
    assert found.groups is not None
    assert PEAK * found.group_bytes(found.groups) + FLOOR <= 80 * GIB
    assert PEAK * found.group_bytes(found.groups - 1) + FLOOR > 80 * GIB


@pytest.mark.parametrize("architecture", ["deepseek", "dbrx", "gpt_oss", "qwen3_vl_moe", "grok-1"])
def test_what_is_stored_adds_up(tmp_path: Path, architecture: str):
    """Bytes of experts, router and skipped tensors add up to the whole checkpoint, for every layout."""
    checkpoint = Checkpoint.open(write_tiny(architecture, tmp_path))
    found = inspect(checkpoint)
    stored = sum(entry.nbytes for entry in checkpoint.tensors.values())
    assert found.group_bytes(1) + found.router_bytes + found.skipped_bytes == stored
    assert 4 * found.expert_parameters == found.expert_bytes
    assert (found.skipped_bytes > 0) == (architecture == "qwen3_vl_moe"), "only towers are skipped"
    assert any(found.gating in line for line in lines(found))


def test_groups_are_suggested_for_a_memory(tmp_path: Path):
    """The fewest groups that fit are suggested; none where one expert of every layer does not fit."""
    found = inspect(Checkpoint.open(write_tiny("qwen3_moe", tmp_path)))
    assert suggest(found, 2 * GIB).groups == 1
    tight = FLOOR + int(PEAK * found.group_bytes(16)) + 1
    assert suggest(found, tight).groups == 16
    assert suggest(found, FLOOR).groups is None
    assert "not even one expert" in list(lines(suggest(found, FLOOR)))[-1]


def test_the_report_says_what_a_replica_takes(tmp_path: Path):
    """Of a quantised checkpoint: format and bits, small sizes in KiB, and the memory of a router and of one group's replica."""
    found = inspect(Checkpoint.open(write_tiny("mixtral-gptq", tmp_path)), 2 * GIB)
    assert found.expert_formats == ("gptq (4 bits)",)
    assert 4 < found.bits < 6
    report = "\n".join(lines(found))
    assert re.search(
        r"one expert +[\d.]+ KiB per layer, .* stored as gptq \(4 bits\), [\d.]+ bits per parameter", report
    )
    assert re.search(r"router .* of weights; takes up to 1\.\d\d GiB of memory, 1\.00 GiB of it kv_memory", report)
    assert re.search(
        r"^1 group +[\d.]+ KiB of weights each; a replica takes up to 4\d\d\.\d\d MiB", report, re.MULTILINE
    )
    assert re.search(r"^suggested +1 group for 2\.00 GiB per replica", report, re.MULTILINE)
