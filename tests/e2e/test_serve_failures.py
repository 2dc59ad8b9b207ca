"""What `moiety serve` meets on a running Ray: a replica that cannot start, and what its workers import."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray import serve

from moiety.config.application import AppSettings
from moiety.deploy.ray_probe import check_ray
from moiety.deploy.run import deploy_app
from moiety.errors import FailedPrecondition
from support.ray_head import RayHead

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]

APP = "broken"
ELSEWHERE = """
import json, sys
from moiety.deploy.ray_cluster import existing_ray

with existing_ray(sys.argv[1]):
    import ray

    print(json.dumps(ray.get(ray.remote(num_cpus=0)(lambda: __import__("sys").path).remote())))
"""


def test_the_first_failed_start_ends_the_wait_with_its_reason(ray_head: RayHead) -> None:
    """A replica's own sentence and its log come at its first failure, without Serve's further tries; nothing stays deployed."""
    lines: list[tuple[float, str]] = []
    settings = AppSettings(
        app=APP,
        model=ray_head.model,
        groups=1,
        registry=ray_head.redis_url,
        gateway={"port": 0, "http_port": 0, "num_cpus": 0.1},
        router={"num_cpus": 0.1, "kv_memory": 1024},
        experts={"num_cpus": 0.1, "max_replicas": 1},
    )
    with pytest.raises(
        FailedPrecondition, match=r"router cannot start: setting kv_memory = 1024: must be at least"
    ) as raised:
        deploy_app(settings, wait_s=100, progress=lambda line: lines.append((time.monotonic(), line)))
    log = Path(str(raised.value).rpartition("(log: ")[2].removesuffix(")"))
    assert "this replica cannot start" in log.read_text()
    assert not any("tries again" in line for _, line in lines)
    assert APP not in serve.status().applications


def test_a_clones_folder_hides_nothing_from_workers(ray_head: RayHead, tmp_path: Path) -> None:
    """The folder in which a command runs is not on its workers' path: it may hold a clone called `moiety`."""
    (tmp_path / "moiety").mkdir()
    command = [sys.executable, "-P", "-c", ELSEWHERE, ray_head.address]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) not in done.stdout
    assert "site-packages" in done.stdout


def test_a_ray_that_answers(ray_head: RayHead) -> None:
    """The address that `ray start` prints is accepted."""
    check_ray(ray_head.address)
