"""Opens the registry that the `registry` setting names. redis-py is imported only for a URL that needs it."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from urllib.parse import unquote, urlsplit

from moiety.config.registry_url import without_secrets
from moiety.core.system import SystemId
from moiety.errors import ConfigError, RegistryUnreachable
from moiety.registry.interface import TTL_S, Registry

FORGET_S = TTL_S + 1.0


def connect(url: str, system: SystemId) -> Registry:
    """Returns the part of the registry at `url` that belongs to `system`; contacts nothing before the first operation.

    Raises ConfigError if `url` has no known form.
    """
    scheme, separator, _ = url.partition("://")
    bound = "must be redis://…, rediss://…, unix:///… or file:///…"
    if separator and scheme in ("redis", "rediss", "unix"):
        from moiety.registry.redis import RedisRegistry

        return RedisRegistry(url, system)
    if separator and scheme == "file":
        from moiety.registry.file import FileRegistry

        parts = urlsplit(url)
        if parts.netloc in ("", "localhost") and parts.path.startswith("/"):
            return FileRegistry(unquote(parts.path))
        bound = "must be file:// and an absolute path, such as file:///run/moiety/registry.json"
    raise ConfigError("registry", without_secrets(url), bound)


async def live_systems(url: str, app: str) -> list[SystemId]:
    """Returns the systems of application `app` that have a live service in the registry at `url`, in the order of their text.

    Raises ConfigError as `connect` does, and for a registry file, which belongs to the one system that wrote it.
    """
    if url.startswith("file://"):
        raise ConfigError(
            "registry", without_secrets(url), "must be redis://…, rediss://… or unix:///…: a file holds one system"
        )
    store = connect(url, SystemId(app, "", "", 1, 1))
    try:
        return sorted(await store.systems(), key=str)
    finally:
        await store.close()


async def forget(url: str, system: SystemId) -> None:
    """Deletes what `system`, which was ended on purpose, left in the registry at `url`.

    Waits up to FORGET_S for entries of replicas that were killed. If they stay, or the registry does not answer, what the
    system left expires a day after its last sign of life.
    """
    store = connect(url, system)
    try:
        with suppress(RegistryUnreachable, TimeoutError):
            async with asyncio.timeout(FORGET_S):
                while not await store.forget():
                    await asyncio.sleep(0.1)
    finally:
        await store.close()
