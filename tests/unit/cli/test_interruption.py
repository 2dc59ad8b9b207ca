"""An interrupted benchmark leaves no process and no file."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest


@pytest.mark.slow
def test_interrupted_benchmark_leaves_nothing(moiety_process: Callable, tmp_path: Path) -> None:
    """SIGINT during calls gives exit status 130, ends every child, and removes temporary folders.

    Slow: it starts every service.
    """
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = moiety_process("bench", "hop", "--calls", "1000000", "--payload", "4", env=environment)
    for line in process.stderr:
        if "measure:" in line:
            break
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 4  # expert, router, gateway, echo
    assert list(tmp_path.glob("*/*"))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.strip().endswith("interrupted by SIGINT")
    deadline = time.monotonic() + 5
    while any(child.is_running() for child in children):
        assert time.monotonic() < deadline, children
        time.sleep(0.05)
    assert not list(tmp_path.glob("*/*"))  # but for the folder of this user
