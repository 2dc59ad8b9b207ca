"""Peers as processes: their answers, their failures, and that none of their processes is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moiety.bench.serve.peer_processes import Peer, PeerKind
from moiety.errors import Unavailable

LOAD = {"dtype": "float32", "threads": 1, "slots": 3, "context": 32}
START_S = 60.0


def _peer(module: str, scratch: Path) -> Peer:
    return Peer(PeerKind(module, module, sys.executable, {"HF_HUB_OFFLINE": "1"}), scratch)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["hf_generate", "hf_continuous"])
async def test_peer_generates(tiny: Callable[[str], str], tmp_path: Path, module: str) -> None:
    """Every prompt gets its tokens, with rising times after the start. Slow: each case imports and loads transformers."""
    peer = _peer(module, tmp_path)
    try:
        await peer.start({**LOAD, "checkpoint": tiny("qwen3_moe")}, START_S)
        began, arrivals = await peer.run([[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]], 6, START_S)
    finally:
        await peer.stop()
    assert peer.name.startswith("transformers ")
    assert [len(times) for times in arrivals] == [6, 6, 6]
    for times in arrivals:
        assert began < times[0]
        assert times == sorted(times)


async def test_peer_without_its_library(tmp_path: Path) -> None:
    """A Python without the peer's library gives an error that names the missing module, and its process ends."""
    peer = _peer("vllm_cpu", tmp_path)
    with pytest.raises(Unavailable, match="ModuleNotFoundError: No module named 'vllm'"):
        await peer.start({**LOAD, "checkpoint": str(tmp_path)}, START_S)
    assert peer.pid is not None
    await peer.stop()
    with pytest.raises(ProcessLookupError):
        os.killpg(peer.pid, 0)


def test_stopped_peer_does_not_outlive_its_parent(tmp_path: Path) -> None:
    """When the benchmark is killed, its peers end too, although they are stopped."""
    loaded = tmp_path / "loaded"  # used as the peer's Python: any program that speaks the protocol will do
    loaded.write_text('#!/bin/sh\nread order\necho \'{"system": "x"}\'\nsleep 600\n')
    loaded.chmod(0o755)
    parent = f"""
import asyncio, os, signal
from pathlib import Path
from moiety.bench.serve.peer_processes import Peer, PeerKind

async def main():
    peer = Peer(PeerKind("x", "x", {str(loaded)!r}, {{}}), Path({str(tmp_path)!r}))
    await peer.start({{"threads": 1}}, 10.0)
    print(peer.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, timeout=30)
    assert done.returncode == -signal.SIGKILL
    until = time.monotonic() + 10
    while _exists(int(done.stdout)):
        assert time.monotonic() < until, "the peer still exists"
        time.sleep(0.02)


def _exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


async def test_peer_that_dies(tmp_path: Path) -> None:
    """A process that ends without an answer gives an error with the last lines of its log."""
    peer = Peer(PeerKind("false", "none", "false", {}), tmp_path)
    with pytest.raises(Unavailable, match="the process ended: its log is empty"):
        await peer.start({**LOAD, "checkpoint": str(tmp_path)}, START_S)
    await peer.stop()
