"""The Triton kernels compiled for Hopper, which needs no GPU and shows what the interpreter cannot."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install 'moiety[gpu]'")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_configuration_fits_an_sm():
    """No kernel spills or exceeds 227 KiB of shared memory, and prefill uses wgmma with asynchronous copies."""
    # Each line of the tile table, four models' shapes, each weight format: some 140 kernels in 35 s. They compile in another
    # process, because this one interprets its kernels.
    command = [sys.executable, "-W", "ignore", "-m", "moiety_kernels.gpu.aot", "--json"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    built = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(built) > 50, done.stderr[-2000:]
    for kernel in built:
        assert kernel["spilled"] == 0, kernel
        assert kernel["shared"] <= 227 * 1024, kernel
    prefill = [
        kernel for kernel in built if kernel["kernel"] == "grouped_gemm_kernel" and "4096 tokens" in kernel["case"]
    ]
    assert prefill
    assert all(kernel["wgmma"] > 0 and kernel["copies"] > 0 for kernel in prefill)
    assert done.returncode == 0, done.stderr[-2000:]
