"""Reading experts: exactly the requested ones, in little memory, in a process that does not import transformers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moiety.core.experts import ExpertSet
from moiety.errors import CheckpointError
from moiety.model.checkpoint.checkpoint import EXPERT, Checkpoint
from moiety.model.experts.cached import expert_layout
from moiety.model.experts.read import load_experts
from moiety.synthetic import write_tiny
from support.architectures import CORE

SLACK = 40 << 20  # allocator, page tables and the interpreter's own growth


def everything(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Reads all tensors of a checkpoint with safetensors."""
    return {name: tensor for shard in checkpoint.shards for name, tensor in load_file(shard).items()}


@pytest.mark.parametrize("architecture", CORE)
def test_experts_have_the_published_values(open_tiny, architecture: str):
    """Each requested expert has its published tensors, and no other expert is read."""
    checkpoint, layout = open_tiny(architecture)
    held = ExpertSet.parse("0:1,5;2:7")
    loaded = load_experts(checkpoint, layout, held, torch.float32)
    assert set(loaded) == {(0, 1), (0, 5), (2, 7)}
    published = everything(checkpoint)
    for (layer, expert), weights in loaded.items():
        for field, names in layout.layers[layer].sources.items():
            parts = [
                published[name.replace(EXPERT, str(expert))] if EXPERT in name else published[name][expert]
                for name in names
            ]
            whole = torch.cat(parts)
            transposed = field in layout.layers[layer].transposed  # gpt-oss publishes [in, out]
            assert torch.equal(getattr(weights, field), whole.T if transposed else whole)


def test_stored_and_served_dtype_may_differ(open_tiny):
    """float32 experts can be read as bfloat16, with the same values as torch's cast."""
    checkpoint, layout = open_tiny("mixtral")
    wide = load_experts(checkpoint, layout, [(0, 5)], torch.float32)[0, 5]
    narrow = load_experts(checkpoint, layout, [(0, 5)], torch.bfloat16)[0, 5]
    assert torch.equal(narrow.gate_up, wide.gate_up.bfloat16())
    assert torch.equal(narrow.down, wide.down.bfloat16())


@pytest.mark.parametrize("pair", [(4, 0), (0, 8), (-1, 0)])
def test_a_pair_the_model_lacks_is_refused(open_tiny, pair: tuple[int, int]):
    """A layer or expert out of bounds raises an error that states the bounds."""
    with pytest.raises(CheckpointError, match="it has 4 layers of 8"):
        load_experts(*open_tiny("mixtral"), [pair], torch.float32)


def test_a_tensor_that_vanished_is_named(open_tiny, tmp_path: Path):
    """A missing tensor raises an error that names it; a file truncated after opening raises an error, too."""
    checkpoint, layout = open_tiny("mixtral")
    name = layout.layers[0].sources["down"][0].replace(EXPERT, "2")
    without = {key: entry for key, entry in checkpoint.tensors.items() if key != name}
    other = Checkpoint(checkpoint.path, checkpoint.config, checkpoint.shards, without)
    with pytest.raises(CheckpointError, match=f"tensor {name} is missing"):
        load_experts(other, layout, [(0, 2)], torch.float32)

    copy = Checkpoint.open(shutil.copytree(checkpoint.path, tmp_path / "copy"))
    with copy.tensor(name).file.open("r+b") as stream:
        stream.truncate(copy.tensor(name).start + 4)
    with pytest.raises(CheckpointError, match="truncated"):
        load_experts(copy, layout, [(0, 2)], torch.float32)


MEASURE = """
import json, sys
from pathlib import Path
import torch
from moiety.core.experts import ExpertSet
from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.experts.cached import expert_layout
from moiety.model.experts.read import load_experts

def kibibytes(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) << 10

torch.zeros(1)
kind, folder, held = sys.argv[1:]
if kind == "router":
    import transformers.models.auto.modeling_auto, transformers.models.mixtral.modeling_mixtral
    from moiety.model.trunk.read import load_trunk
checkpoint = Checkpoint.open(folder)
layout = expert_layout(checkpoint)
Path("/proc/self/clear_refs").write_text("5")  # start a new high-water mark
anonymous, peak = kibibytes("RssAnon"), kibibytes("VmHWM")
if kind == "router":
    part = load_trunk(checkpoint, layout, torch.bfloat16)
    weights = sum(parameter.nbytes for parameter in part.parameters())
else:
    part = load_experts(checkpoint, layout, ExpertSet.parse(held), torch.bfloat16)
    weights = sum(expert.nbytes for expert in part.values())
print(json.dumps({
    "weights": weights,
    "resident": kibibytes("RssAnon") - anonymous,
    "peak": kibibytes("VmHWM") - peak,
    "transformers": "transformers" in sys.modules,
}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes a model with 300 MiB of experts in bf16 and a trunk of 20 MiB: enough to see what a process holds."""
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "head_dim": 64}
    folder = write_tiny("mixtral", tmp_path_factory.mktemp("large"), dtype="bfloat16", **sizes)
    expert_layout(Checkpoint.open(folder))  # into the cache, as the first reader would
    return folder


def measure(kind: str, folder: Path, held: str = "") -> dict[str, Any]:
    """Loads one part in a new process; returns the weights' bytes and the growth of its memory, at the end and at the peak."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's /proc")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, kind, str(folder), held],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_an_expert_process_holds_its_experts_only(large: Path):
    """Loading three of eight experts grows memory by their bytes, even at the peak, and does not import transformers."""
    seen = measure("experts", large, "0-7:2-4")
    assert seen["weights"] == 8 * 3 * 3 * 512 * 1536 * 2
    assert not seen["transformers"]
    assert abs(seen["resident"] - seen["weights"]) <= SLACK
    assert seen["peak"] <= seen["weights"] + SLACK


def test_a_router_process_holds_no_expert(large: Path):
    """Loading the trunk of a 300 MiB model takes its own 20 MiB, and at the peak at most three times as much."""
    seen = measure("router", large)
    assert seen["weights"] < 24 << 20
    assert abs(seen["resident"] - seen["weights"]) <= SLACK
    assert seen["peak"] <= 3 * seen["weights"] + SLACK
