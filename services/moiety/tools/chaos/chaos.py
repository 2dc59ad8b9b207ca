"""`moiety chaos`: starts a system, lets faults happen to it under load, and ends everything it started."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from moiety.errors import FailedPrecondition
from moiety.synthetic import write_tiny
from moiety.tools.chaos.fault import System
from moiety.tools.chaos.kinds import chosen
from moiety.tools.chaos.local_system import LocalSystem
from moiety.tools.chaos.redis_server import RedisServer
from moiety.tools.chaos.schedule import schedule
from moiety.tools.chaos.trials import Outcome, Progress, run_trials

DISK_BYTES = 256 << 20  # of the small file system for logs and caches
CONTEXT = 2048  # tokens, of the tiny model
TINY_KV_MEMORY = CONTEXT << 10  # bytes: as many tokens as its context, so that one request can need every block
KV_MEMORY = 1 << 30  # bytes, for a model that is given


@dataclass(frozen=True, slots=True)
class ChaosRun:
    """What to try. At least one of `faults` and `minutes` bounds the run."""

    seed: int
    faults: int | None
    minutes: float | None
    only: tuple[str, ...] = ()
    model: str | None = None  # a checkpoint folder; None: a tiny one is written
    slack: float = 1.0  # multiplies every bound of a gap, for a busy machine
    groups: int = 2
    replicas: int = 2  # per group
    routers: int = 2

    @property
    def size(self) -> dict[str, int]:
        """How large the system is."""
        return {
            "groups": self.groups,
            "replicas": self.replicas,
            "routers": self.routers,
            "kv_memory": TINY_KV_MEMORY if self.model is None else KV_MEMORY,
        }


@contextmanager
def chaos_folder(run: ChaosRun) -> Iterator[tuple[Path, str]]:
    """Makes a folder for everything that a run writes, and yields it with that of the model. Removes it at the end.

    The folder is a small file system of its own where this process may mount one, so that it can be filled. Raises
    FailedPrecondition where there is no /proc to read.
    """
    if not sys.platform.startswith("linux"):
        raise FailedPrecondition(f"moiety chaos needs Linux: {sys.platform} has no /proc and no 127.0.0.2")
    with ExitStack() as ends:
        made = TemporaryDirectory(prefix="moiety-chaos-", ignore_cleanup_errors=True)
        folder = Path(ends.enter_context(made))
        disk = folder / "disk"
        disk.mkdir()
        if _call("mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "moiety-chaos", str(disk)):
            ends.callback(_call, "umount", "--lazy", str(disk))
        model = run.model or str(write_tiny("qwen3_moe", folder / "model", max_position_embeddings=CONTEXT))
        yield disk, model


async def run_local(run: ChaosRun, disk: Path, model: str, say: Progress) -> Outcome:
    """Runs the trials on a LocalCluster, whose services write to `disk`."""
    with RedisServer() as redis:
        say(f"starting {run.groups} x {run.replicas} expert replicas, {run.routers} routers and a gateway")
        async with LocalSystem.started(model, redis, disk, **run.size) as system:
            return await _tried(run, system, ray=False, say=say)


@contextmanager
def on_ray(run: ChaosRun, disk: Path, model: str, say: Progress) -> Iterator[Coroutine[Any, Any, Outcome]]:
    """Serves the model on a Ray of its own while the block runs; yields the coroutine that runs the trials."""
    from moiety.tools.chaos import ray_system

    folder = disk.parent  # the small file system has no room for Ray's logs
    with RedisServer() as redis, ray_system.deployed(model, redis, folder, **run.size, say=say) as application:

        async def trials() -> Outcome:
            async with ray_system.RaySystem.of(application, redis, folder) as system:
                return await _tried(run, system, ray=True, say=say)

        yield trials()


async def _tried(run: ChaosRun, system: System, *, ray: bool, say: Progress) -> Outcome:
    return await run_trials(
        system,
        schedule(run.seed, chosen(run.only, ray=ray)),
        faults=run.faults,
        seconds=None if run.minutes is None else 60 * run.minutes,
        slack=run.slack,
        say=say,
    )


def _call(*command: str) -> bool:
    """Runs a command quietly; returns whether it exists and succeeded."""
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False
