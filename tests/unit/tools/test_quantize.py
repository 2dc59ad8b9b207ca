"""`moiety quantize`: the weights fit the memory, experts are written as chosen, and impossible requests are refused."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner

from moiety.bench.quantize import bench_quantize, quality_lines
from moiety.cli.main import cli
from moiety.errors import CheckpointError, ConfigError
from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.experts.cached import expert_layout
from moiety.model.experts.read import load_experts
from moiety.policy.precision import Precision
from moiety.synthetic import write_tiny
from moiety.tools.quantize.corpus import shipped_text
from moiety.tools.quantize.quantize import PICTURE, REPORT, quantise

SIZES = {
    "hidden_size": 128,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_experts": 8,
    "dtype": "bfloat16",
}
MEMORY = 1_600_000  # bytes; the model has 2.1 MB in bfloat16, so some experts must get fewer bits, but not all


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that stores experts one by one, wide enough for groups of 128."""
    return write_tiny("qwen3_moe", tmp_path_factory.mktemp("source"), **SIZES)


@pytest.fixture(scope="module")
def text() -> str:
    """A page of calibration text."""
    return shipped_text()[:4000]


def test_the_command_fits_the_memory_and_reports_its_choice(source: Path, tmp_path: Path):
    """Weights take at most --memory; report and picture list every expert; the config names the format."""
    out = tmp_path / "out"
    done = CliRunner().invoke(
        cli, ["quantize", str(source), "--memory", str(MEMORY), "--out", str(out), "--tokens", "600"]
    )
    assert done.exit_code == 0, done.output
    written = Checkpoint.open(out)
    assert sum(entry.nbytes for entry in written.tensors.values()) <= MEMORY
    report = json.loads((out / REPORT).read_text())
    assert report["bytes"] <= MEMORY
    assert len(report["experts"]) == 16
    assert len({expert["bits"] for expert in report["experts"]}) > 1
    cells = [cell for cell in ElementTree.parse(out / PICTURE).iter() if cell.tag.endswith("title")]
    assert len(cells) == 16
    assert json.loads((out / "config.json").read_text())["quantization_config"]["format"] == "pack-quantized"


def test_what_is_written_is_what_was_chosen(source: Path, tmp_path: Path, text: str):
    """Each expert is read back at its precision, with exactly the values that quantising it in memory gives."""
    quantised = quantise(str(source), tmp_path / "out", MEMORY, text, tokens=600)
    checkpoint = Checkpoint.open(tmp_path / "out")
    loaded = load_experts(checkpoint, expert_layout(checkpoint), quantised.allocation.chosen, torch.bfloat16)
    original = Checkpoint.open(source)
    plain = load_experts(original, expert_layout(original), quantised.allocation.chosen, torch.bfloat16)
    kinds = set()
    for pair, option in quantised.allocation.chosen.items():
        expected = plain[pair]
        if option.precision.bits < 16:
            expected = expected.quantised(option.precision.bits, option.precision.group)
        assert loaded[pair].weight_format == expected.weight_format
        for field in ("gate_up", "down"):
            values = [getattr(expert.dequantised(torch.float32), field) for expert in (loaded[pair], expected)]
            assert torch.equal(*(value.float() for value in values))
        kinds.add(loaded[pair].weight_format)
    assert len(kinds) > 1


def test_more_memory_costs_less_error(source: Path, tmp_path: Path, text: str):
    """With enough memory nothing is quantised; with less memory the error is larger."""
    errors = [
        quantise(str(source), tmp_path / str(memory), memory, text, tokens=600).allocation.error
        for memory in (10_000_000, MEMORY, 1_100_000)
    ]
    assert errors[0] == 0.0
    assert errors == sorted(errors)
    assert "quantization_config" not in json.loads((tmp_path / "10000000" / "config.json").read_text())


def test_a_memory_below_four_bits_names_the_least(source: Path, tmp_path: Path, text: str):
    """A memory that is too small is refused with the least bytes that suffice, before anything is measured or written."""
    said: list[str] = []
    with pytest.raises(ConfigError, match=r"must be at least [0-9]+ bytes"):
        quantise(str(source), tmp_path / "out", 100_000, text, tokens=600, progress=said.append)
    assert not said
    assert not (tmp_path / "out").exists()


def test_experts_in_one_tensor_are_refused(tmp_path: Path, text: str):
    """A fused layout, which cannot have different bits per expert, is refused."""
    folder = write_tiny("gpt_oss", tmp_path / "fused")
    with pytest.raises(CheckpointError, match="holds all experts of a layer in one tensor"):
        quantise(str(folder), tmp_path / "out", MEMORY, text)


def test_another_run_s_output_is_not_overwritten(source: Path, tmp_path: Path, text: str):
    """An output folder that is not empty is refused."""
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(ConfigError, match="must be a new or an empty folder"):
        quantise(str(source), tmp_path, MEMORY, text)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_mixed_beats_uniform_int4_at_equal_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """On a trained model the mixed choice loses less than all experts at 4 bits. Slow: it trains the model, in minutes."""
    rows = bench_quantize(tmp_path, steps=150)
    with capsys.disabled():
        print("", *quality_lines(rows), sep="\n")
    by_name = {row.name: row for row in rows}
    base, uniform = by_name["bfloat16"], by_name[f"int{Precision(4, 32)}".replace(" bits", "")]
    mixed = by_name[f"mixed, memory of int{Precision(4, 32)}".replace(" bits", "")]
    assert mixed.nbytes <= uniform.nbytes
    assert mixed.error < uniform.error
    assert mixed.perplexity < uniform.perplexity
    assert by_name["int8"].perplexity <= 1.01 * base.perplexity
