"""The Triton kernels compiled for Hopper ahead of time: what no interpreter can tell, and no GPU is needed for."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install 'moiety[gpu]'")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_configuration_fits_an_sm():
    """At every line of the table of tiles, for four models' shapes and each kind of weights: no spills, shared memory
    within 227 KiB, prefill on wgmma with asynchronous copies. Takes 35 s: it compiles some 140 kernels, in a process of its
    own since this one's are interpreted.
    """
    command = [sys.executable, "-W", "ignore", "-m", "moiety_kernels.gpu.aot", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
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
