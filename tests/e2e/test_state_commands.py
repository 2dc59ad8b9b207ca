"""`moiety serve` on Ray, seen and ended from another terminal: status, logs, generate and stop, none with an address."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import redis

from moiety.registry.embedded_redis import EmbeddedRedis
from support.ray_head import RayHead

MOIETY = Path(sys.executable).with_name("moiety")


def moiety(*words: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in a process of its own, as a second terminal would."""
    return subprocess.run([MOIETY, *words], capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def registry() -> Iterator[EmbeddedRedis]:
    """A Redis that outlives the system."""
    with EmbeddedRedis() as server:
        yield server


@pytest.fixture
def started(
    tiny: Callable[[str], str], registry: EmbeddedRedis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[subprocess.Popen[str]]:
    """A `moiety serve` that has just been started; the only system that these tests see."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    command = [MOIETY, "serve", tiny("mixtral"), "--groups", "2", "--grpc-port", "0", "--http-port", "0"]
    command += ["--registry", registry.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        yield process
        if process.poll() is None:
            process.terminate()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_system_is_seen_and_stopped_from_another_terminal(
    started: subprocess.Popen[str], registry: EmbeddedRedis, tmp_path: Path
) -> None:
    """Status and logs show the system from its start to its end; `stop` leaves no process, record, folder or key.

    Over 20 s: it starts Ray and four replicas on two cores.
    """
    assert started.stdout is not None
    for line in started.stdout:
        if line.startswith("Ctrl-C"):
            break
    shown = moiety("status")
    assert shown.stdout.startswith("moiety: serving, model "), shown.stdout + shown.stderr
    state = json.loads(moiety("status", "--json").stdout)
    assert {name: len(live) for name, live in state["deployments"].items()} == {
        "gateway": 1,
        "router": 1,
        "experts-0": 1,
        "experts-1": 1,
    }
    generated = moiety("generate", "Hello", "--max-tokens", "5", "--ignore-eos", "--json")
    assert len(json.loads(generated.stdout)["choices"][0]["token_ids"]) == 5, generated.stderr
    (router,) = state["deployments"]["router"]
    logs = moiety("logs", "router").stdout
    assert f"router {router['id']}: INFO" in logs
    assert "initializing replica" in logs
    following = subprocess.Popen([MOIETY, "logs", "-f", "--lines", "0"], stdout=subprocess.PIPE, text=True)
    descendants = psutil.Process(started.pid).children(recursive=True)
    stopped = moiety("stop")
    assert stopped.returncode == 0, stopped.stderr
    assert "moiety has ended" in stopped.stderr
    started.wait(10)
    _, alive = psutil.wait_procs(descendants, timeout=10)
    assert alive == []
    following.communicate(timeout=10)
    assert following.returncode == 0
    assert list((tmp_path / "moiety").iterdir()) == []
    assert not Path(state["logs"]).exists()
    with redis.Redis(port=registry.port) as client:
        assert client.keys() == []
    assert moiety("stop").returncode == 1


@pytest.mark.ray
def test_an_unknown_application_of_a_cluster_is_named(ray_head: RayHead) -> None:
    """`stop --ray-address` ends nothing but the application that it is given; where that is not there, it says so."""
    outcome = moiety("stop", "--ray-address", ray_head.address, "--app", "nope")
    assert outcome.returncode == 1
    assert "no application 'nope' on the Ray at" in outcome.stderr
