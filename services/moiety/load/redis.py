"""The real registry, on Redis or Valkey: the only module that knows redis-py.

Keys, all under `moiety:{<app>}:` (the braces keep one Redis Cluster slot):

    replica:<id>   JSON, PX 3000        replicas   set of ids, pruned on read       generation   random, until emptied
    load:<writer>  hash, EX 60          writers    set of ids, pruned on read       hot[:<writer>]  sorted set, see below
    busy:<id>      JSON, PX 5000        reporters  set of ids, pruned on read       wake         sorted set by expiry
    placement      JSON                 epoch      that of `placement`              routers      set of ids, as replicas
    decisions      stream, 1,000 entries

`hot` is for people: the 64 experts that get the most rows per second now, `<layer>/<expert>` -> rows per second, over the
last three seconds and all routers. `redis-cli ZREVRANGE 'moiety:{<app>}:hot' 0 9 WITHSCORES` shows the first ten.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import redis.asyncio
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from moiety.core import Busy, Demand, Placement, Replica, Role
from moiety.errors import ConfigError, RegistryUnreachable
from moiety.load import entries, redis_scripts
from moiety.load.rates import Recent
from moiety.load.registry import BUSY_TTL_S, DECISIONS_KEPT, DEMAND_TTL_S, TTL_S, WAKE_TTL_S
from moiety.load.urls import without_secrets

SOCKET_TIMEOUT_S = 1.0  # to connect, and for each answer
OPERATION_TIMEOUT_S = 2.0  # both together
HOT_ENTRIES = 64

T = TypeVar("T")


class RedisRegistry:
    """A registry in Redis. Each operation is one round trip, or an error within OPERATION_TIMEOUT_S.

    A client is made on first use in each event loop, so one registry may serve several threads' loops; every loop that
    used it must `close()` it.
    """

    def __init__(self, url: str, app: str) -> None:
        try:
            parse_url(url)
        except ValueError as error:
            raise ConfigError("registry", without_secrets(url), str(error)) from None
        self._url = url
        self._prefix = f"moiety:{{{app}}}:"
        self._clients: dict[asyncio.AbstractEventLoop, Any] = {}
        self._reader = entries.TolerantReader()
        self._recent: dict[str, Recent] = {}  # by writer, those of this process
        self._parsed: dict[bytes, Replica] = {}  # the entries of the last reading

    async def register(self, replica: Replica) -> None:
        async with self._store() as client, client.pipeline(transaction=True) as pipeline:
            pipeline.set(self._key("replica", replica.id), entries.replica_to_json(replica), px=_milliseconds(TTL_S))
            pipeline.sadd(self._key("replicas"), replica.id)
            if replica.role is Role.ROUTER:
                pipeline.sadd(self._key("routers"), replica.id)
            pipeline.set(self._key("generation"), uuid.uuid4().hex, nx=True)
            await pipeline.execute()

    async def deregister(self, replica_id: str) -> None:
        async with self._store() as client, client.pipeline(transaction=True) as pipeline:
            pipeline.delete(self._key("replica", replica_id))
            pipeline.srem(self._key("replicas"), replica_id)
            pipeline.srem(self._key("routers"), replica_id)
            await pipeline.execute()

    async def replicas(self) -> tuple[Replica, ...]:
        parsed: dict[bytes, Replica] = {}

        def decode(raw: bytes) -> Replica:
            # Readers poll several times a second, and a beat mostly writes the same text again.
            parsed[raw] = self._parsed.get(raw) or entries.replica_from_json(raw)
            return parsed[raw]

        live = await self._read_entries("replicas", "replica", decode)
        self._parsed = parsed
        return tuple(live[replica_id] for replica_id in sorted(live))

    async def routers(self) -> tuple[Replica, ...]:
        live = await self._read_entries("routers", "replica", entries.replica_from_json)
        return tuple(live[replica_id] for replica_id in sorted(live))

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
        text = entries.placement_to_json(placement)
        return await self._script(redis_scripts.SET_PLACEMENT, ["placement", "epoch"], placement.epoch, text) == 1

    async def publish_load(self, replica_id: str, busy: Busy | None = None, demand: Demand | None = None) -> None:
        async with self._store() as client, client.pipeline(transaction=True) as pipeline:
            if busy is not None:
                pipeline.set(self._key("busy", replica_id), entries.busy_to_json(busy), px=_milliseconds(BUSY_TTL_S))
                pipeline.sadd(self._key("reporters"), replica_id)
            if demand is not None:
                self._add_demand(pipeline, replica_id, demand)
            await pipeline.execute()

    def _add_demand(self, pipeline: Any, writer: str, demand: Demand) -> None:
        load, hot, recent_s = self._key("load", writer), self._key("hot", writer), int(BUSY_TTL_S)
        pipeline.hset(load, mapping=entries.demand_to_fields(demand))
        pipeline.expire(load, int(DEMAND_TTL_S))
        pipeline.sadd(self._key("writers"), writer)
        pipeline.delete(hot)
        if hottest := _hottest(self._recent.setdefault(writer, Recent()).rows_per_s(demand)):
            pipeline.zadd(hot, hottest)
            pipeline.expire(hot, recent_s)  # what a lost router asked for is not hot for long
        keys = (self._key("hot"), self._key("writers"))
        pipeline.eval(redis_scripts.SUM_HOT, 2, *keys, self._key("hot", ""), HOT_ENTRIES, recent_s)

    async def demand(self) -> Mapping[str, Demand]:
        names = entries.DEMAND_FIELDS
        found = await self._script(redis_scripts.READ_HASHES, ["writers"], self._key("load", ""), *names)

        def decode(values: Sequence[bytes | None]) -> Demand:
            return entries.demand_from_fields(dict(zip(names, values, strict=False)))

        return self._decoded("load", found, decode)

    async def busy(self) -> Mapping[str, Busy]:
        return await self._read_entries("reporters", "busy", entries.busy_from_json)

    async def wake(self, layer: int, experts: Sequence[int]) -> None:
        if experts:
            members = [f"{layer}/{expert}" for expert in experts]
            await self._script(redis_scripts.WAKE, ["wake"], _milliseconds(WAKE_TTL_S), *members)

    async def wakes(self) -> Mapping[int, frozenset[int]]:
        waited: dict[int, frozenset[int]] = {}
        for raw in await self._script(redis_scripts.WAKES, ["wake"]):
            name = raw.decode(errors="replace")
            if pair := self._reader.read(f"wake:{name}", _layer_and_expert, raw):
                layer, expert = pair
                waited[layer] = waited.get(layer, frozenset()) | {expert}
        return waited

    async def record_decision(self, decision: Mapping[str, Any]) -> None:
        fields = {"json": json.dumps(decision)}
        async with self._store() as client:
            await client.xadd(self._key("decisions"), fields, maxlen=DECISIONS_KEPT, approximate=False)

    async def decisions(self, count: int = 100) -> Sequence[Mapping[str, Any]]:
        async with self._store() as client:
            newest = await client.xrevrange(self._key("decisions"), count=count)
        found = [part for name, fields in reversed(newest) for part in (name, fields.get(b"json", b""))]
        return list(self._decoded("decisions", found, entries.decision_from_json).values())

    async def server_counters(self) -> tuple[int, int, float]:
        """Of the whole server since its start: operations, bytes either way, CPU seconds."""
        async with self._store() as client:
            stats, cpu = await client.info("stats"), await client.info("cpu")
        transferred = stats["total_net_input_bytes"] + stats["total_net_output_bytes"]
        return stats["total_commands_processed"], transferred, cpu["used_cpu_user"] + cpu["used_cpu_sys"]

    async def close(self) -> None:
        client = self._clients.pop(asyncio.get_running_loop(), None)
        if client is not None:
            with contextlib.suppress(RedisError, OSError):
                await client.aclose()

    async def _read_entries(self, index: str, kind: str, decode: Callable[[bytes], T]) -> dict[str, T]:
        found = await self._script(redis_scripts.READ_ENTRIES, [index], self._key(kind, ""))
        return self._decoded(kind, found, decode)

    def _decoded(self, kind: str, found: Sequence[Any], decode: Callable[[Any], T]) -> dict[str, T]:
        """Readable entries of a flat [id, value, id, value, …] answer."""
        live: dict[str, T] = {}
        for raw_id, raw in zip(found[::2], found[1::2], strict=True):
            name = raw_id.decode(errors="replace")
            if (value := self._reader.read(f"{kind}:{name}", decode, raw)) is not None:
                live[name] = value
        return live

    async def _script(self, script: str, keys: Sequence[str], *arguments: str | int) -> Any:
        async with self._store() as client:
            return await client.eval(script, len(keys), *(self._key(key) for key in keys), *arguments)

    def _key(self, *parts: str) -> str:
        return self._prefix + ":".join(parts)

    @contextlib.asynccontextmanager
    async def _store(self) -> AsyncIterator[Any]:
        """This loop's client; whatever goes wrong with it inside becomes RegistryUnreachable."""
        try:
            async with asyncio.timeout(OPERATION_TIMEOUT_S):
                yield self._client()
        except (RedisError, OSError, TimeoutError) as error:
            reason = str(error) or "no answer in time"
            raise RegistryUnreachable(f"registry {without_secrets(self._url)}: {reason}") from error

    def _client(self) -> Any:  # redis-py types its commands for both of its clients at once: not awaitable under mypy
        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            for closed in [known for known in self._clients if known.is_closed()]:
                del self._clients[closed]
            self._clients[loop] = redis.asyncio.Redis.from_url(
                self._url,
                socket_connect_timeout=SOCKET_TIMEOUT_S,
                socket_timeout=SOCKET_TIMEOUT_S,
                protocol=2,  # plain replies from every server version
                # A lost answer is reported, not asked for again: the caller's next beat repeats what may be repeated.
                retry=Retry(NoBackoff(), 0),
            )
        return self._clients[loop]


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def _hottest(rows_per_s: npt.NDArray[np.float64]) -> dict[str, float]:
    """`layer/expert` -> rows per second, of the HOT_ENTRIES experts of [layers, experts] with the most of them."""
    flat, experts = rows_per_s.reshape(-1), rows_per_s.shape[1]
    top = np.argsort(-flat, kind="stable")[:HOT_ENTRIES]
    return {f"{cell // experts}/{cell % experts}": round(float(flat[cell]), 1) for cell in top if flat[cell] > 0}


def _layer_and_expert(member: bytes) -> tuple[int, int]:
    layer, _, expert = member.partition(b"/")
    return int(layer), int(expert)
