"""`ray up` with the unchanged local.yaml, on two hosts that are namespaces of this machine, as users without root."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from two_hosts import Network, missing, two_hosts

FILE = "cluster/local.yaml"
ENVIRONMENT = ". ~/moiety/cluster/environment.sh && "
PACED = "    deployments: [" + ", ".join(f"{{name: experts-{n}, user_config: {{capacity: 300}}}}" for n in (0, 1)) + "]"
LENGTH = 400  # tokens: a stream of some seconds
# Processes of Ray, of Serve's replicas and of Redis.
OURS = "ps -eo pid,args | grep -E '[r]ay::|[r]aylet|[g]cs_server|[r]ay/dashboard|[r]edis-server|[m]onitor.py' || true"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def network(tmp_path: Path, tiny: Callable[[str], str]) -> Iterator[Network]:
    """The hosts of local.yaml, with a checkpoint."""
    if lacking := missing():
        pytest.skip(lacking)
    with two_hosts(tmp_path, tiny("mixtral")) as network:
        yield network


def generate(network: Network) -> list[str]:
    """Returns the tokens of a generation on the cluster's gateway, which is on the head."""
    return network.run(_generation(network), timeout_s=120).splitlines()[0].split()


def test_the_unchanged_file_runs_a_cluster(network: Network) -> None:
    """The cluster comes up, serves on the head, grows onto the second host, survives its loss, and goes down without rest.

    Over 20 s: two hosts set themselves up, and Ray starts twice.
    """
    head, worker = network.hosts
    network.run(["ray", "up", "-y", FILE], timeout_s=300)
    on_head(network, "~/venv/bin/serve deploy ~/moiety/cluster/serve.yaml")
    expected: list[str] = []

    def serves() -> bool:
        with suppress(AssertionError):
            expected[:] = generate(network)
        return len(expected) == LENGTH

    wait(serves, "the gateway on the head")
    # Paced, the tiny model is busy enough to grow: a live setting, so nothing restarts.
    on_head(network, f"(cat ~/moiety/cluster/serve.yaml; echo '{PACED}') > ~/paced.yaml")
    on_head(network, "~/venv/bin/serve deploy ~/paced.yaml")
    wait(lambda: grown(network, worker), "a replica of an expert group on the second host")
    assert generate(network) == expected

    with network.start(_generation(network)) as stream:
        assert stream.stdout is not None
        begun = stream.stdout.read(100)  # until tokens come
        network.on(worker, "pkill -KILL raylet")
        assert (begun + stream.stdout.read()).splitlines()[0].split() == expected

    on_head(network, "~/venv/bin/serve shutdown -y")
    on_head(network, "~/venv/bin/python ~/moiety/cluster/shared_redis.py stop")
    network.run(["ray", "down", "-y", FILE], timeout_s=120)
    network.on(worker, "~/venv/bin/ray stop")
    for host in (head, worker):
        wait(partial(ended, network, host), f"the end of all processes on {host}")


def grown(network: Network, worker: str) -> bool:
    """Whether an expert replica runs on `worker`, after some more load."""
    streams = [network.start(_generation(network)) for _ in range(6)]
    for stream in streams:
        stream.communicate(timeout=120)
    return "ServeReplica:moiety:experts" in network.on(worker, "ps -eo args")


def ended(network: Network, host: str) -> bool:
    """Whether nothing of Ray, Moiety and Redis runs on `host`."""
    return not network.on(host, OURS).strip()


def on_head(network: Network, command: str) -> str:
    """Runs `command` on the head as cluster/README.md says. Returns the output."""
    return network.run(["ray", "exec", FILE, ENVIRONMENT + command], timeout_s=120)


def wait(condition: Callable[[], bool], what: str, timeout_s: float = 180.0) -> None:
    """Waits until `condition` holds. Raises AssertionError after `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not there after {timeout_s:g} s"
        time.sleep(0.5)


def _generation(network: Network) -> list[str]:
    command = f"moiety generate 'Each expert' --address {network.hosts[0]}:50051 --max-tokens {LENGTH}"
    return shlex.split(command + " --ignore-eos --token-ids")
