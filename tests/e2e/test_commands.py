"""`moiety serve` and `moiety demo`, run as users run them: each starts its own Ray and Redis, and ends them."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

MOIETY = Path(sys.executable).with_name("moiety")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def _all_end(processes: list[psutil.Process]) -> bool:
    """Whether all of `processes` end within ten seconds."""
    _, alive = psutil.wait_procs(processes, timeout=10)
    return not alive


def test_serve_answers_and_ctrl_c_ends_every_process(tiny: Callable[[str], str]) -> None:
    """`moiety serve` prints its addresses, clients of both APIs get answers there, and SIGINT leaves no process behind.

    Over 20 s: it starts Ray and four replicas on two cores.
    """
    command = [MOIETY, "serve", tiny("mixtral"), "--groups", "2", "--grpc-port", "0", "--http-port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as served:
        assert served.stdout is not None
        address, http = "", ""
        for line in served.stdout:
            if found := re.match(r"ready: OpenAI HTTP API at (http://\S+)/v1", line):
                http = found[1]
            if found := re.match(r"ready: gRPC moiety\.v1\.GenerationService at (\S+)", line):
                address = found[1]
            if line.startswith("Ctrl-C"):
                break
        generated = subprocess.run(
            [MOIETY, "generate", "Hello", "--address", address, "--max-tokens", "5", "--ignore-eos"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert generated.returncode == 0, generated.stderr
        assert "5 new tokens" in generated.stderr
        with urllib.request.urlopen(f"{http}/healthz", timeout=10) as answer:
            assert answer.status == 200
        descendants = psutil.Process(served.pid).children(recursive=True)
        served.send_signal(signal.SIGINT)
        assert served.wait(60) == 128 + signal.SIGINT
        assert _all_end(descendants)


def test_the_demo_shows_every_stage() -> None:
    """`moiety demo` streams, scales up and down with reasons, prints a trace, survives a kill, and ends cleanly.

    Over 20 s: it runs every stage of the demo.
    """
    shown = subprocess.run(
        [MOIETY, "demo"], capture_output=True, text=True, timeout=240, check=False, start_new_session=True
    )
    assert shown.returncode == 0, shown.stdout + shown.stderr
    for expected in (
        r"32 tokens in 32 messages",
        r"decision: experts-\d 1 → 2: busy",
        r"decision: experts-\d 2 → 1: busy",
        r"└─ expert\.kernel",
        r"killed experts-1, pid \d+",
        r"they are the same as those of a run without a fault",
        r"Done; nothing is left behind",
    ):
        assert re.search(expected, shown.stdout), expected
