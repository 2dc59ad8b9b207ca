"""A part of a Redis or Valkey store, reached from any event loop; the only module that imports redis-py."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Sequence
from typing import Any

import redis.asyncio
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from moiety.config.registry_url import without_secrets
from moiety.core.text import reason_of
from moiety.errors import ConfigError, RegistryUnreachable, WritesRefused

BOUND = "must be a Redis URL; in a password, escape / ? # @ as %2F %3F %23 %40"
SOCKET_TIMEOUT_S = 1.0  # to connect, and for each answer
OPERATION_TIMEOUT_S = 2.0  # for a whole operation
# The codes with which Redis refuses writes while it answers reads; what they mean and what to do.
REFUSALS = {
    "OOM": "its memory is full: raise maxmemory",
    "READONLY": "it is a replica: point `registry` at the primary, or promote it",
    "MISCONF": "it cannot save to disk: free disk space, or set stop-writes-on-bgsave-error no",
    "NOREPLICAS": "too few replicas are connected to it: see min-replicas-to-write",
}
REFUSAL = re.compile(rf"\b({'|'.join(REFUSALS)})\b")


class RedisStore:
    """The keys of a Redis that begin with `prefix`.

    Each event loop gets its own client on first use, so one store may serve the loops of several threads. Every loop
    that used it must `close()` it.
    """

    def __init__(self, url: str, prefix: str) -> None:
        try:
            parse_url(url)
        except ValueError:  # its text may show a part of the password
            raise ConfigError("registry", without_secrets(url), BOUND) from None
        self._url, self._prefix = url, prefix
        self._clients: dict[asyncio.AbstractEventLoop, Any] = {}

    async def server_counters(self) -> tuple[int, int, float]:
        """Returns totals of the whole server since its start: operations, bytes sent and received, CPU seconds."""
        async with self._store() as client:
            stats, cpu = await client.info("stats"), await client.info("cpu")
        transferred = stats["total_net_input_bytes"] + stats["total_net_output_bytes"]
        return stats["total_commands_processed"], transferred, cpu["used_cpu_user"] + cpu["used_cpu_sys"]

    async def close(self) -> None:
        client = self._clients.pop(asyncio.get_running_loop(), None)
        if client is not None:
            with contextlib.suppress(RedisError, OSError):
                await client.aclose()

    async def _script(self, script: str, keys: Sequence[str], *arguments: str | bytes | int) -> Any:
        async with self._store() as client:
            return await client.register_script(script)([self._key(key) for key in keys], arguments)

    def _key(self, *parts: str) -> str:
        return self._prefix + ":".join(parts)

    @contextlib.asynccontextmanager
    async def _store(self) -> AsyncIterator[Any]:
        """Yields this event loop's Redis client. Redis errors and timeouts inside the context become RegistryUnreachable."""
        task = asyncio.current_task()
        cancellations = task.cancelling() if task is not None else 0
        try:
            async with asyncio.timeout(OPERATION_TIMEOUT_S):
                yield self._client()
        except (RedisError, OSError, TimeoutError) as error:
            name, reason = f"registry {without_secrets(self._url)}", _reason(error)
            if (refusal := REFUSAL.search(f"{getattr(error, 'status_code', '')} {reason}")) and isinstance(
                error, ResponseError
            ):
                raise WritesRefused(f"{name} refuses writes: {refusal[0]}: {REFUSALS[refusal[0]]}") from error
            raise RegistryUnreachable(f"{name}: {reason}") from error
        finally:
            # redis-py sends with asyncio.wait_for, which on Python 3.11 swallows a cancellation that comes as it ends.
            if task is not None and task.cancelling() > cancellations:
                raise asyncio.CancelledError

    # Any: redis-py types its commands for its sync and its async client at once, so mypy would refuse to await them.
    def _client(self) -> Any:
        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            for closed in [known for known in self._clients if known.is_closed()]:
                del self._clients[closed]
            self._clients[loop] = redis.asyncio.Redis.from_url(
                self._url,
                socket_connect_timeout=SOCKET_TIMEOUT_S,
                socket_timeout=SOCKET_TIMEOUT_S,
                protocol=2,  # plain replies from every server version
                # A lost answer is an error, not retried: the caller's next beat repeats what may be repeated.
                retry=Retry(NoBackoff(), 0),
            )
        return self._clients[loop]


def _reason(error: Exception) -> str:
    """Returns why an operation failed: in the system's words where it had no connection, else in those of Redis."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None:
            return reason_of(cause)
        cause = cause.__cause__ or cause.__context__
    return str(error) or "no answer in time"
