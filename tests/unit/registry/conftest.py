"""One real Redis for the session, and empty registries of both kinds."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator

import pytest
import redis

from moiety.registry.connect import connect
from moiety.registry.embedded_redis import EmbeddedRedis
from moiety.registry.interface import Registry
from moiety.registry.memory import MemoryRegistry
from moiety.testing import fake_system


@pytest.fixture(scope="session")
def redis_server() -> Iterator[EmbeddedRedis]:
    """A server shared by all tests; a test that stops or empties a server starts its own."""
    with EmbeddedRedis() as server:
        yield server


@pytest.fixture
def redis_cli(redis_server: EmbeddedRedis) -> Iterator[redis.Redis]:
    """A plain client, which sees what an operator sees."""
    with redis.Redis(port=redis_server.port, decode_responses=True) as client:
        yield client


@pytest.fixture
def app() -> str:
    """A name that no other test uses, so that tests share a server and see only their own keys."""
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture(params=["memory", "redis"])
async def registry(request: pytest.FixtureRequest, redis_server: EmbeddedRedis, app: str) -> AsyncIterator[Registry]:
    """An empty registry of each kind."""
    opened: Registry = connect(redis_server.url, fake_system(app=app)) if request.param == "redis" else MemoryRegistry()
    yield opened
    await opened.close()
