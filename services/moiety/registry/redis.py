"""The registry on Redis or Valkey; what is stored under which key.

`moiety:{<app>}:systems` is a sorted set of `<key> <system>` by the time of its last sign of life. All other keys of a system
stand under `moiety:{<app>}:<key>:`, where <key> is `SystemId.key` (the braces keep them in one Redis Cluster slot):

    beat:<id>      digest of the entry, PX 3000: a replica is live as long as this key exists
    replica:<id>   JSON, PX 6000        replicas   set of ids, pruned on read       generation   random, new once emptied
    load:<writer>  hash, EX 60          writers    set of ids, pruned on read       hot[:<writer>]  sorted set, see below
    busy:<id>      JSON, PX 5000        reporters  set of ids, pruned on read       missing      sorted set by expiry
    placement      JSON                 epoch      epoch of `placement`             routers      set of ids, like replicas
    decisions      stream, 1,000 entries           probe      written to find out whether Redis takes writes

A heartbeat renews `beat:<id>` and `replica:<id>`. It writes the entry if it finds another digest there, if a part of it is
missing (Redis may have evicted it), and every 10 s in any case. A reader asks for the list of digests, which the server sends
only if the list has changed. Then it fetches the entries it lacks. It fetches a router's counters only if their field
`stamp`, new at every report, has changed.

Keys without an expiry above expire SYSTEM_TTL_S after the last service of the system has written its entry. What ends a
system on purpose deletes all of them (`forget`).

`hot` is for operators: `<layer>/<expert>` -> rows per second over the last three seconds, for the 64 busiest experts. It sums
the routers' `hot:<writer>`. `redis-cli ZREVRANGE 'moiety:{<app>}:<key>:hot' 0 9 WITHSCORES` shows the ten busiest.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import Any, TypeVar

from moiety.core.load import ExpertDemand, ReplicaLoad
from moiety.core.replica import Placement, Replica, Role
from moiety.core.system import SystemId
from moiety.registry import entries, redis_scripts
from moiety.registry.interface import (
    DECISIONS_KEPT,
    DEMAND_TTL_S,
    LOAD_TTL_S,
    MISSING_EXPERTS_TTL_S,
    SYSTEM_TTL_S,
    TTL_S,
)
from moiety.registry.listing import Listing, digest_of
from moiety.registry.rates import RecentRates, hottest
from moiety.registry.redis_store import RedisStore

REWRITE_S = 10.0  # an unchanged entry is written again after this long, with all that belongs to it
ENTRY_TTL_S = 2 * TTL_S  # of the entry itself: who finds its digest also finds the entry
HOT_ENTRIES = 64
# Keys whose expiry is set anew with every full write of an entry. Routers, which are few, also keep what changes rarely.
KEPT_BY_ALL = ("replicas", "generation")
KEPT_BY_ROUTERS = (*KEPT_BY_ALL, "routers", "placement", "epoch", "decisions")
WITHOUT_ID = (*KEPT_BY_ROUTERS, "reporters", "writers", "hot", "missing", "probe")

T = TypeVar("T")


class RedisRegistry(RedisStore):
    """A registry in Redis. An operation takes one or two round trips, or fails within OPERATION_TIMEOUT_S."""

    def __init__(self, url: str, system: SystemId) -> None:
        self._app_prefix = f"moiety:{{{system.app}}}:"
        super().__init__(url, f"{self._app_prefix}{system.key}:")
        # the index of the application's systems, and this system's member there
        self._systems, self._member = f"{self._app_prefix}systems", f"{system.key} {system}"
        self._reader = entries.TolerantReader()
        self._recent: dict[str, RecentRates] = {}  # by writer id; only writers of this process
        self._written: dict[str, float] = {}  # replica id -> time of its last full write, on the event loop's clock
        self._listings: dict[str, Listing] = {}  # set of replicas -> its last reading
        self._demand: dict[str, tuple[bytes, ExpertDemand]] = {}  # writer id -> stamp and counters last read

    async def register(self, replica: Replica) -> None:
        text = entries.replica_to_json(replica)
        digest, now = digest_of(text), asyncio.get_running_loop().time()
        async with self._store() as client:
            # Renewing comes first: a Redis whose memory is full still renews, but takes no new entry.
            renewed = await self._renew(client, replica, digest)
            if not renewed or now - self._written.get(replica.id, -inf) >= REWRITE_S:
                await self._write(client, replica, text, digest)
                self._written[replica.id] = now

    async def _renew(self, client: Any, replica: Replica, digest: bytes) -> bool:
        """Renews the TTL of a replica's entry; returns whether the store still had all of the entry with this `digest`."""
        indices = ("replicas", "routers") if replica.role is Role.ROUTER else ("replicas",)
        lifetimes = _milliseconds(TTL_S), _milliseconds(ENTRY_TTL_S)
        renew = client.register_script(redis_scripts.RENEW)
        return bool(await renew((self._key(""),), (replica.id, *lifetimes, *indices)) == digest)

    async def _write(self, client: Any, replica: Replica, text: str, digest: bytes) -> None:
        systems, now = self._systems, time.time()
        async with client.pipeline(transaction=True) as pipeline:
            pipeline.set(self._key("replica", replica.id), text, px=_milliseconds(ENTRY_TTL_S))
            pipeline.set(self._key("beat", replica.id), digest, px=_milliseconds(TTL_S))
            pipeline.sadd(self._key("replicas"), replica.id)
            if replica.role is Role.ROUTER:
                pipeline.sadd(self._key("routers"), replica.id)
            pipeline.set(self._key("generation"), uuid.uuid4().hex, nx=True)
            pipeline.zremrangebyscore(systems, "-inf", now - SYSTEM_TTL_S)
            pipeline.zadd(systems, {self._member: now})
            kept = KEPT_BY_ROUTERS if replica.role is Role.ROUTER else KEPT_BY_ALL
            for key in (*map(self._key, kept), systems):
                pipeline.expire(key, int(SYSTEM_TTL_S))
            await pipeline.execute()

    async def deregister(self, replica_id: str) -> None:
        self._written.pop(replica_id, None)
        async with self._store() as client, client.pipeline(transaction=True) as pipeline:
            pipeline.delete(self._key("beat", replica_id), self._key("replica", replica_id))
            pipeline.srem(self._key("replicas"), replica_id)
            pipeline.srem(self._key("routers"), replica_id)
            await pipeline.execute()

    async def check_writes(self) -> None:
        async with self._store() as client:
            await client.set(self._key("probe"), b"", px=1)

    async def replicas(self) -> tuple[Replica, ...]:
        return await self._live("replicas")

    async def routers(self) -> tuple[Replica, ...]:
        return await self._live("routers")

    async def generation(self) -> str | None:
        async with self._store() as client:
            value: bytes | None = await client.get(self._key("generation"))
        return None if value is None else value.decode(errors="replace")

    async def placement(self) -> Placement | None:
        async with self._store() as client:
            text: bytes | None = await client.get(self._key("placement"))
        return None if text is None else self._reader.read("placement", entries.placement_from_json, text)

    async def placement_epoch(self) -> int:
        async with self._store() as client:
            value: bytes | None = await client.get(self._key("epoch"))
        return 0 if value is None else self._reader.read("epoch", int, value) or 0

    async def set_placement(self, placement: Placement) -> bool:
        arguments = placement.epoch, entries.placement_to_json(placement), int(SYSTEM_TTL_S)
        return await self._script(redis_scripts.SET_PLACEMENT, ["placement", "epoch"], *arguments) == 1

    async def publish_load(
        self, replica_id: str, busy: ReplicaLoad | None = None, demand: ExpertDemand | None = None
    ) -> None:
        async with self._store() as client, client.pipeline(transaction=demand is not None) as pipeline:
            if busy is not None:  # the key before the id: a reader prunes an id that has no key
                pipeline.set(self._key("busy", replica_id), entries.load_to_json(busy), px=_milliseconds(LOAD_TTL_S))
                pipeline.sadd(self._key("reporters"), replica_id)
                pipeline.expire(self._key("reporters"), int(SYSTEM_TTL_S))
            if demand is not None:
                await self._add_demand(pipeline, replica_id, demand)
            await pipeline.execute()

    async def _add_demand(self, pipeline: Any, writer: str, demand: ExpertDemand) -> None:
        load, hot, recent_s = self._key("load", writer), self._key("hot", writer), int(LOAD_TTL_S)
        pipeline.hset(load, mapping={**entries.demand_to_fields(demand), "stamp": uuid.uuid4().hex})
        pipeline.expire(load, int(DEMAND_TTL_S))
        pipeline.sadd(self._key("writers"), writer)
        pipeline.expire(self._key("writers"), int(SYSTEM_TTL_S))
        pipeline.delete(hot)
        if busiest := hottest(self._recent.setdefault(writer, RecentRates()).rows_per_s(demand), HOT_ENTRIES):
            pipeline.zadd(hot, busiest)
            pipeline.expire(hot, recent_s)  # the rows of a lost router soon leave the sum
        keys = (self._key("hot"), self._key("writers"))
        await pipeline.register_script(redis_scripts.SUM_HOT)(keys, (self._key("hot", ""), HOT_ENTRIES, recent_s))

    async def expert_demand(self) -> Mapping[str, ExpertDemand]:
        names, known = ("stamp", *entries.DEMAND_FIELDS), self._demand
        stamps = (part for writer, (stamp, _) in known.items() for part in (writer, stamp))
        found = await self._script(
            redis_scripts.READ_HASHES, ["writers"], self._key("load", ""), len(names), *names, *stamps
        )
        latest: dict[str, tuple[bytes, ExpertDemand]] = {}
        for raw_id, fields in zip(found[::2], found[1::2], strict=True):
            writer = raw_id.decode(errors="replace")
            if isinstance(fields, bytes):  # only the stamp: no flush since the last reading
                latest[writer] = known[writer]
                continue
            values = dict(zip(names, fields, strict=False))
            if (demand := self._reader.read(f"load:{writer}", entries.demand_from_fields, values)) is not None:
                latest[writer] = (values["stamp"] or b"", demand)
        self._demand = latest
        return {writer: demand for writer, (_, demand) in latest.items()}

    async def replica_load(self) -> Mapping[str, ReplicaLoad]:
        _, *found = await self._script(redis_scripts.READ_ENTRIES, ["reporters"], self._key("busy", ""), "")
        return self._decoded("busy", found, entries.load_from_json)

    async def report_missing_experts(self, layer: int, experts: Sequence[int]) -> None:
        if experts:
            members = [f"{layer}/{expert}" for expert in experts]
            await self._script(
                redis_scripts.REPORT_MISSING, ["missing"], _milliseconds(MISSING_EXPERTS_TTL_S), *members
            )

    async def missing_experts(self) -> Mapping[int, frozenset[int]]:
        missing: dict[int, frozenset[int]] = {}
        for raw in await self._script(redis_scripts.READ_MISSING, ["missing"]):
            name = raw.decode(errors="replace")
            if pair := self._reader.read(f"missing:{name}", _layer_and_expert, raw):
                layer, expert = pair
                missing[layer] = missing.get(layer, frozenset()) | {expert}
        return missing

    async def record_decision(self, decision: Mapping[str, Any]) -> None:
        fields = {"json": json.dumps(decision)}
        async with self._store() as client, client.pipeline(transaction=False) as pipeline:
            pipeline.xadd(self._key("decisions"), fields, maxlen=DECISIONS_KEPT, approximate=False)
            pipeline.expire(self._key("decisions"), int(SYSTEM_TTL_S))
            await pipeline.execute()

    async def decisions(self, count: int = 100) -> Sequence[Mapping[str, Any]]:
        async with self._store() as client:
            newest = await client.xrevrange(self._key("decisions"), count=count)
        found = [part for name, fields in reversed(newest) for part in (name, fields.get(b"json", b""))]
        return list(self._decoded("decisions", found, entries.decision_from_json).values())

    async def systems(self) -> tuple[SystemId, ...]:
        async with self._store() as client:
            found = await client.zrangebyscore(self._systems, time.time() - SYSTEM_TTL_S, "+inf")
            names = [raw.decode(errors="replace").partition(" ")[2] for raw in found]
            live: list[SystemId] = []
            for name in names:
                if (system := self._reader.read(f"systems:{name}", SystemId.parse, name)) is not None:
                    prefix = f"{self._app_prefix}{system.key}:"
                    ids = await client.smembers(prefix + "replicas")
                    if ids and await client.exists(*(f"{prefix}beat:".encode() + replica_id for replica_id in ids)):
                        live.append(system)
        return tuple(live)

    async def forget(self) -> bool:
        async with self._store() as client:
            keys = (*map(self._key, ("replicas", "reporters", "writers")), self._systems, *map(self._key, WITHOUT_ID))
            return await client.register_script(redis_scripts.FORGET)(keys, (self._key(""), self._member)) == 1

    async def _live(self, index: str) -> tuple[Replica, ...]:
        """Returns the replicas in the set `index` ("replicas" or "routers"). Fetches only entries that are new or changed."""
        known = self._listings.get(index, Listing())
        prefixes = self._key("beat", ""), self._key("replica", "")
        async with self._store() as client:
            read = client.register_script(redis_scripts.READ_ENTRIES)
            digest, *found = await read((self._key(index),), (prefixes[0], known.digest, prefixes[1]))
            if digest == known.digest:
                return known.replicas
            beats = list(zip(found[::2], found[1::2], strict=True))
            unknown = known.unknown(beats)
            texts = await client.mget([prefixes[1].encode() + replica_id for replica_id in unknown]) if unknown else []

        def decode(replica_id: bytes, text: bytes) -> Replica | None:
            name = f"replica:{replica_id.decode(errors='replace')}"
            return self._reader.read(name, entries.replica_from_json, text)

        self._listings[index] = known.following(digest, beats, dict(zip(unknown, texts, strict=True)), decode)
        return self._listings[index].replicas

    def _decoded(self, kind: str, found: Sequence[Any], decode: Callable[[Any], T]) -> dict[str, T]:
        """Returns id -> decoded value for `found`, a flat [id, value, id, value, …] list; skips values that are broken."""
        live: dict[str, T] = {}
        for raw_id, raw in zip(found[::2], found[1::2], strict=True):
            name = raw_id.decode(errors="replace")
            if (value := self._reader.read(f"{kind}:{name}", decode, raw)) is not None:
                live[name] = value
        return live


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def _layer_and_expert(member: bytes) -> tuple[int, int]:
    layer, _, expert = member.partition(b"/")
    return int(layer), int(expert)
