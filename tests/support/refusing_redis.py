"""Makes a Redis refuse writes while it answers reads, in each way in which operators meet that."""

from __future__ import annotations

import time

import pytest
import redis

from moiety.registry.embedded_redis import EmbeddedRedis

# What Redis refuses writes with; "evicting": it has evicted all it had, and is still full.
REFUSALS = ("OOM", "evicting", "READONLY", "MISCONF", "NOREPLICAS")
SNAPSHOT_S = 10.0


class RefusingRedis:
    """A Redis of its own that refuses writes between `refuse` and `mend`."""

    def __init__(self, server: EmbeddedRedis) -> None:
        self.server, self.client = server, redis.Redis(port=server.port)
        self._before: dict[str, str] = {}

    def refuse(self, how: str) -> str:
        """Begins to refuse writes; returns the code with which Redis does."""
        if how == "READONLY":
            self.client.replicaof("127.0.0.1", 1)
        elif how == "NOREPLICAS":
            self._set("min-replicas-to-write", "1")
        elif how == "MISCONF":
            try:
                self._set("dir", "/proc")
            except redis.ResponseError as error:
                pytest.skip(f"this Redis does not let a client break its snapshots: {error}")
            self._set("save", "900 1")
            self.client.bgsave()
            until = time.monotonic() + SNAPSHOT_S
            while self.client.info("persistence")["rdb_last_bgsave_status"] == "ok":
                assert time.monotonic() < until, "the snapshot did not fail"
                time.sleep(0.01)
        else:
            self._set("maxmemory-policy", {"OOM": "noeviction", "evicting": "allkeys-lru"}[how])
            self._set("maxmemory", "1")
        return "OOM" if how == "evicting" else how

    def mend(self) -> None:
        """Takes writes again."""
        for name in reversed(self._before):
            self.client.config_set(name, self._before[name])
        self.client.replicaof("NO", "ONE")

    def _set(self, name: str, value: str) -> None:
        self._before[name] = self.client.config_get(name)[name]
        self.client.config_set(name, value)
