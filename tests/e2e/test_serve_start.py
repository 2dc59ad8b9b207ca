"""`moiety serve` as a newcomer starts it: beside a clone, with variables of another Ray, twice on the same ports."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

MOIETY = Path(sys.executable).with_name("moiety")
OTHER_RAY = {"RAY_ADDRESS": "127.0.0.1:9", "RAY_NAMESPACE": "other", "RAY_RUNTIME_ENV": '{"working_dir": "/nowhere"}'}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def test_serve_beside_a_clone_and_another_ray(
    tiny: Callable[[str], str], tmp_path: Path, unused_tcp_port_factory: Callable[[], int]
) -> None:
    """A folder `moiety` and RAY_ADDRESS change nothing; a second system on the ports of one that starts is refused at once.

    Over 20 s: it starts Ray and four replicas on two cores.
    """
    (tmp_path / "moiety").mkdir()
    ports = ["--grpc-port", str(unused_tcp_port_factory()), "--http-port", str(unused_tcp_port_factory())]
    command = [MOIETY, "serve", tiny("mixtral"), *ports]
    options = {"cwd": tmp_path, "env": {**os.environ, **OTHER_RAY}, "text": True}
    with subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True, **options) as served:
        assert served.stderr is not None
        try:
            lines = []
            for line in served.stderr:
                lines.append(line)
                if "Ray: ready" in line:
                    again = subprocess.run(command, capture_output=True, timeout=60, check=False, **options)
                    assert re.search(r"gateway\.port = \d+: another system is starting", again.stderr), again.stderr
                if "moiety: ready" in line:
                    break
            assert "moiety: ready" in lines[-1], "".join(lines)
        finally:
            served.send_signal(signal.SIGINT)
            served.stderr.read()
