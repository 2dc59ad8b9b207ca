"""The parts of the GPU benchmark that need no GPU. Times in the interpreter mean nothing and are not checked."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from moiety_kernels.reference.gating import Gate

pytest.importorskip("triton", reason="triton is not installed: pip install 'moiety[gpu]'")

from moiety_kernels.bench.__main__ import main
from moiety_kernels.bench.clock import Ceilings, Clock
from moiety_kernels.bench.peers import grouped_mm
from moiety_kernels.bench.table import OURS, measure, summary
from moiety_kernels.bench.tune import tune
from moiety_kernels.gpu.models import Model
from moiety_kernels.gpu.tiles import Tile

TINY = Model("tiny", 3, 3, 32, 32, Gate(2), kind="mxfp4")


@pytest.mark.parametrize(
    "model", [replace(TINY, choices=5), replace(TINY, clamped=True)], ids=["some elsewhere", "gpt-oss"]
)
def test_every_implementation_computes_the_same(model: Model):
    """Ours, torch's grouped product and a loop of products agree; each gets a row, each peer a line of the summary."""
    rows = list(measure(model, [3], Clock("cpu"), Ceilings(1e9, 1e9), torch.bfloat16, {"torch": grouped_mm_block}))
    by = [(row.operation, row.implementation, row.weights) for row in rows]
    assert by == [
        ("block", OURS, "bfloat16"),
        ("block", "torch", "bfloat16"),
        ("experts", OURS, "bfloat16"),
        ("experts", "grouped_mm", "bfloat16"),
        ("experts", "cuBLAS", "bfloat16"),
        ("experts", OURS, "mxfp4"),
    ]
    assert all(row.error <= 0.02 for row in rows)
    assert all("DIFFERS" not in str(row) for row in rows)
    assert len(list(summary(rows))) == 3


def grouped_mm_block(work):
    """Prepares a peer for whole blocks from torch's grouped product."""
    product = grouped_mm(work)
    order = work.index.flatten().argsort(stable=True)[: len(work.rows)]

    def run() -> torch.Tensor:
        slots = work.rows.new_zeros(work.index.numel(), work.rows.shape[1])
        slots[order] = product()
        return (slots.view(*work.index.shape, -1) * work.weights[:, :, None]).sum(1).to(work.x.dtype)

    return run


@pytest.mark.slow
def test_tuning_prints_a_table():
    """Tuning yields the fastest tiles as lines that fit the table of tiles."""
    tiles = [Tile(128, 32, 32, 4, 2), Tile(64, 32, 32, 4, 2)]
    lines = list(tune([TINY], Clock("cpu"), torch.float32, lambda gated, largest: iter(tiles)))
    table = eval(f"({''.join(line for line in lines if '#' not in line)})", {"Tile": Tile})
    assert [line[0] for line in table] == [16, 32, 96, None]
    assert all(tile in [replace(each, band=8) for each in tiles] for line in table for tile in line[1:])


def test_without_a_gpu_the_command_exits_with_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Without a CUDA device the command prints why and exits with 2."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["bench"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "No CUDA device" in capsys.readouterr().out


@pytest.mark.slow
def test_checks_run_in_the_interpreter():
    """--check-only finds every kernel right on a machine without a GPU."""
    command = [sys.executable, "-m", "moiety_kernels.bench", "--check-only"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WRONG" not in done.stdout
