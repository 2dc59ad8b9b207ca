"""What a system uses when no request runs: memory, descriptors, segments, registry keys, KV blocks."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from moiety.core.replica import Replica, Role
from moiety.errors import MoietyError
from moiety.internal.v1 import engine_pb2, engine_pb2_grpc
from moiety.tools.chaos.fault import System
from moiety.v1 import generation_pb2
from moiety.wire.channels import channel
from moiety.wire.deadline import Deadline
from moiety.wire.event_stream.call_client import CallClient

PROBE_S = 30.0  # longest time for a request that needs nearly every KV block of an idle router
# What a trial, and all trials together, may leave behind. Memory and descriptors: of one process. Allocators keep some
# memory, and gRPC some connections that are closed only later. An idle expert replica keeps the segment of its last call
# until the next one. The keys of a lost replica expire after up to a minute.
RSS_MIB, DESCRIPTORS, SEGMENTS, KEYS = 64, 16, 4, 48


@dataclass(frozen=True, slots=True)
class Usage:
    """What an idle system uses."""

    rss_mib: Mapping[str, int]  # by replica id
    descriptors: Mapping[str, int]
    segments: int  # mappings of shared memory between routers and expert replicas, in all processes
    keys: int  # of the registry
    blocked: tuple[str, ...]  # routers that could not give all their KV blocks to one request


@dataclass(frozen=True, slots=True)
class Leaks:
    """What a trial left behind. Memory and descriptors: the most of any process that lived through it."""

    rss_mib: int
    descriptors: int
    segments: int
    keys: int
    blocked: tuple[str, ...]
    grown: str = ""  # the replica whose memory grew most

    def __str__(self) -> str:
        counts = f"{self.rss_mib:+d} MiB {self.descriptors:+d} fds {self.segments:+d} segs {self.keys:+d} keys"
        return counts + (" KV blocks" if self.blocked else "")

    @property
    def excess(self) -> list[str]:
        """What is more than a trial may leave behind."""
        limits = {
            f"MiB of memory in {self.grown}": (self.rss_mib, RSS_MIB),
            "descriptors": (self.descriptors, DESCRIPTORS),
            "segments": (self.segments, SEGMENTS),
            "registry keys": (self.keys, KEYS),
        }
        over = [f"{more} {what} more than before" for what, (more, most) in limits.items() if more > most]
        return over + [f"{router} does not give all its KV blocks to one request" for router in self.blocked]


def leaks(before: Usage, after: Usage) -> Leaks:
    """Returns what `after` has more than `before`."""

    def most(first: Mapping[str, int], second: Mapping[str, int]) -> tuple[int, str]:
        return max(((second[name] - first[name], name) for name in first.keys() & second.keys()), default=(0, ""))

    rss_mib, grown = most(before.rss_mib, after.rss_mib)
    return Leaks(
        rss_mib=rss_mib,
        descriptors=most(before.descriptors, after.descriptors)[0],
        segments=after.segments - before.segments,
        keys=after.keys - before.keys,
        blocked=after.blocked,
        grown=grown,
    )


async def read_usage(system: System) -> Usage:
    """Reads what the idle `system` uses."""
    routers = system.replicas(Role.ROUTER)
    blocked = await asyncio.gather(*(_fills(router, system.system.key) for router in routers))
    pids = {replica.id: replica.pid for role in Role for replica in system.replicas(role)}
    return Usage(
        rss_mib={name: _rss_mib(pid) for name, pid in pids.items()},
        descriptors={name: _descriptors(pid) for name, pid in pids.items()},
        segments=sum(map(_segments, pids.values())),
        keys=await system.redis.keys(),
        blocked=tuple(router.id for router, fills in zip(routers, blocked, strict=True) if not fills),
    )


async def _fills(router: Replica, system_key: str) -> bool:
    """Whether one request can have nearly all KV blocks of the idle `router`, as far as its context allows: none is lost."""
    async with channel(router.address) as link:
        stub = engine_pb2_grpc.EngineServiceStub(link)
        calls = CallClient(stub, router.id)
        try:
            served = await stub.DescribeEngine(engine_pb2.DescribeEngineRequest(), timeout=PROBE_S)
            length = min(served.max_context, (served.blocks - 1) * served.block_tokens) - 1
            request = engine_pb2.EngineRequest(
                request_id="chaos-probe",
                system_key=system_key,
                prompt_ids=[3 + i % 200 for i in range(length)],
                sampling=generation_pb2.SamplingParams(
                    max_tokens=1, temperature=0.0, top_p=1.0, top_k=0, seed=0, n=1, ignore_eos=True
                ),
            )
            tokens = [
                token
                async for event in calls.generate(request, Deadline.after(PROBE_S), "")
                for token in event.token_ids
            ]
            return len(tokens) == 1
        except MoietyError:
            return False
        finally:
            await calls.close()


def _rss_mib(pid: int) -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", _read(pid, "status"))
    return int(found[1]) >> 10 if found else 0


def _descriptors(pid: int) -> int:
    with suppress(OSError):
        return len(os.listdir(f"/proc/{pid}/fd"))
    return 0


def _segments(pid: int) -> int:
    return _read(pid, "maps").count("memfd:moiety-hop")


def _read(pid: int, file: str) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/{file}").read_text(errors="replace")
    return ""
