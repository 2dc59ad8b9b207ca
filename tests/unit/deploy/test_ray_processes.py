"""Processes that outlive the end of a Ray of this process are killed."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

from moiety.deploy.ray_processes import children, end_all

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_what_outlives_its_parent_is_killed() -> None:
    """A grandchild that goes on when its parent has been shut down is killed; a process beside them is not."""
    tree = "import subprocess, time; subprocess.Popen(['sleep', '100']); print(flush=True); time.sleep(100)"
    with (
        subprocess.Popen([sys.executable, "-c", tree], stdout=subprocess.PIPE, text=True) as parent,
        subprocess.Popen(["sleep", "100"]) as other,
    ):
        assert parent.stdout is not None
        parent.stdout.readline()
        (grandchild,) = map(psutil.Process, children({parent.pid}))
        end_all({parent.pid}, parent.kill)
        assert not psutil.wait_procs([grandchild], timeout=10)[1]
        assert other.poll() is None
        other.kill()
