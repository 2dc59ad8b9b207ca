"""A LocalCluster leaves no process behind, and says how a child ended."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from moiety.errors import MoietyError, RegistryUnreachable
from moiety.local import child_process
from moiety.local.child_process import Child
from moiety.local.cluster import LocalCluster


def children_of_this_process() -> set[int]:
    """Returns the process ids of all services that this process has started and that still exist."""
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            command, status = (entry / "cmdline").read_bytes(), (entry / "stat").read_text()
            if b"moiety.local.child" in command and int(status.rpartition(")")[2].split()[1]) == os.getpid():
                found.add(int(entry.name))
        except OSError:
            continue
    return found


async def keep_stopped(child: Child) -> None:
    """Stops a process again and again, so that it never gets to end by itself."""
    while True:
        child.signal(signal.SIGSTOP)
        await asyncio.sleep(0.002)


async def test_stop_ends_killed_stopped_and_hung_children(
    tiny: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A killed child's log is shown; a stopped one obeys at the end, and one that hangs is killed."""
    monkeypatch.setattr(child_process, "STOP_S", 6.0)  # a busy machine takes seconds to end a router
    before = children_of_this_process()
    with caplog.at_level(logging.WARNING, logger="moiety"):
        async with LocalCluster(tiny("qwen3_moe"), groups=1) as cluster:
            (killed,) = cluster.experts(0)
            stopped, hung = cluster.router(), await cluster.add_expert(0)
            pids = {child.pid for child in cluster.children}
            assert children_of_this_process() - before == {*pids}
            killed.signal(signal.SIGKILL)
            async with asyncio.timeout(20):
                await killed.ended()
            assert [child.pid for child in cluster.experts(0)] == [hung.pid]
            stopped.signal(signal.SIGSTOP)
            hanging = asyncio.create_task(keep_stopped(hung))
        hanging.cancel()
        await asyncio.wait([hanging])
    assert children_of_this_process() == before
    messages = [record.getMessage() for record in caplog.records]
    assert any(f"{killed.replica.id} was killed by signal 9; the end of its log:\n" in message for message in messages)
    assert any(f"{hung.replica.id} did not end within" in message for message in messages)
    assert not any(stopped.replica.id in message for message in messages)


async def test_a_failed_start_leaves_nothing(tiny: Callable[[str], str]) -> None:
    """If one service cannot start, the others, which are still starting, are ended, and its error is raised."""
    before = children_of_this_process()
    with pytest.raises(MoietyError, match="router did not start: "):
        async with LocalCluster(tiny("qwen3_moe"), router={"kv_memory": "1KiB"}):
            raise AssertionError("it started")
    assert children_of_this_process() == before


async def test_a_service_that_cannot_be_registered_is_ended(tiny: Callable[[str], str]) -> None:
    """If the registry file cannot be written, adding a service fails and leaves no process."""
    async with LocalCluster(tiny("qwen3_moe"), groups=1) as cluster:
        before = children_of_this_process()
        in_the_way = cluster.folder / "registry.json.new"
        in_the_way.mkdir()
        with pytest.raises(RegistryUnreachable, match="registry file"):
            await cluster.add_expert(0)
        in_the_way.rmdir()
        assert children_of_this_process() == before
