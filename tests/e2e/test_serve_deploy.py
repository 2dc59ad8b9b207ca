"""`serve deploy` with the unchanged `cluster/serve.yaml`, on a head node that `ray start --head` started."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from ray import serve

from moiety.client import Client
from moiety.errors import Unavailable
from moiety.registry.connect import connect, live_systems
from support.ray_head import RayHead

ROOT = Path(__file__).parents[2]
WAIT_S = 120.0

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]


async def test_the_unchanged_file_deploys_and_serves(ray_head: RayHead, tiny: Callable[[str], str]) -> None:
    """The committed file starts a system that serves on the ports of the environment. `moiety serve` does not replace it.

    Over 20 s: four replicas start on two cores.
    """
    command = [Path(sys.executable).with_name("serve"), "deploy", "-a", ray_head.dashboard, "cluster/serve.yaml"]
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 60, "check": False}
    deployed = await asyncio.to_thread(subprocess.run, command, **options)
    assert deployed.returncode == 0, deployed.stderr
    async with asyncio.timeout(WAIT_S), Client(ray_head.gateway) as client:
        while True:
            with suppress(Unavailable):
                await client.models()
                break
            await asyncio.sleep(0.2)
        stream = client.generate("Hello", max_tokens=8, ignore_eos=True)
        assert len([token async for chunk in stream for token in chunk.token_ids]) == 8
    with await asyncio.to_thread(urllib.request.urlopen, f"http://{ray_head.http}/healthz", timeout=10) as answer:
        assert answer.status == 200
    command = [Path(sys.executable).with_name("moiety"), "serve", tiny("mixtral"), "--ray-address", ray_head.address]
    command += ["--registry", ray_head.redis_url, "--grpc-port", "0", "--http-port", "0"]
    refused = await asyncio.to_thread(subprocess.run, command, **options)
    assert refused.returncode == 1
    assert "setting app = 'moiety': runs on this Ray already: end it with `moiety stop --app moiety" in refused.stderr
    (system,) = await live_systems(ray_head.redis_url, "moiety")
    registry = connect(ray_head.redis_url, system)
    try:
        deployments = {replica.deployment for replica in await registry.replicas()}
        assert deployments == {"gateway", "router", "experts-0", "experts-1"}
    finally:
        await registry.close()
    await asyncio.to_thread(serve.delete, "moiety")
