"""The server that a batch is sent to: one that runs already, or a LocalCluster for the time of the run."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import Any

OpenServer = Callable[[], AbstractAsyncContextManager[str]]  # the block has the server's address


def running_server(url: str) -> OpenServer:
    """Returns what opens a server that runs at `url`."""
    return lambda: nullcontext(url)


def local_server(
    model: str, gateway: Mapping[str, Any], *, say: Callable[[str], None] = lambda _: None, **options: Any
) -> OpenServer:
    """Returns what serves the checkpoint folder `model` on this machine. `gateway`, `options`: those of LocalCluster."""

    @asynccontextmanager
    async def server() -> AsyncIterator[str]:
        from moiety.local.cluster import LocalCluster

        say(f"start: {model}")
        async with LocalCluster(model, gateway=gateway, **options) as cluster:
            yield f"http://{cluster.http_address}"

    return server
