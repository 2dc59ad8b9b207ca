"""The clients of the package openai, for a running door."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai
import pytest

from moiety.testing import FakeEngine, fake_shape
from support.doors import Door

Connect = Callable[..., Any]  # from a door and options to a client


@pytest.fixture
def router() -> FakeEngine:
    """A router whose context takes a conversation with tools."""
    return FakeEngine("a", fake_shape(max_context=2048))


@pytest.fixture
def connect() -> Connect:
    """Makes asynchronous clients, which do not retry unless told to."""

    def client(door: Door, **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{door.url}/v1", api_key="none", **{"max_retries": 0, **options})

    return client


@pytest.fixture
def connect_sync() -> Connect:
    """Makes synchronous clients, which do not retry unless told to; use them in a thread."""

    def client(door: Door, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{door.url}/v1", api_key="none", **{"max_retries": 0, **options})

    return client
