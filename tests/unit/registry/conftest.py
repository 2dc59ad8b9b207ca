"""One real Redis for the session, and empty registries of both kinds."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Iterator

import pytest

from moiety.registry.connect import connect
from moiety.registry.embedded_redis import EmbeddedRedis
from moiety.registry.interface import Registry
from moiety.registry.memory import MemoryRegistry


@pytest.fixture(scope="session")
def redis_server() -> Iterator[EmbeddedRedis]:
    """A server shared by all tests; a test that stops or empties a server starts its own."""
    with EmbeddedRedis() as server:
        yield server


@pytest.fixture
def app() -> str:
    """A name that no other test uses, so that tests share a server and see only their own keys."""
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture(params=["memory", "redis"])
def run(request: pytest.FixtureRequest, app: str) -> Callable[[Callable[[Registry], Awaitable[None]]], None]:
    """Runs a coroutine function on an empty registry of each kind, and closes the registry."""
    url = request.getfixturevalue("redis_server").url if request.param == "redis" else None

    def run_on_registry(behaviour: Callable[[Registry], Awaitable[None]]) -> None:
        async def with_registry() -> None:
            registry: Registry = connect(url, app) if url else MemoryRegistry()
            try:
                await behaviour(registry)
            finally:
                await registry.close()

        asyncio.run(with_registry())

    return run_on_registry
