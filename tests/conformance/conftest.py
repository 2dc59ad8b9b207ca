"""The clients of the package openai for a running door, and a whole system for other clients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from conformance_support import ServedApi

from moiety.gateway.text.tokenizer import Tokenizer
from moiety.testing import FakeEngine, fake_shape
from support.doors import Door
from support.serving import Served

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


@pytest.fixture(scope="session")
def api(chat_served: Served) -> ServedApi:
    """The APIs of a whole system that serves a chat model of random weights."""
    cluster = chat_served.cluster
    thinks = Tokenizer(cluster.model).vocabulary["<think>"]
    return ServedApi(
        cluster.http_address, cluster.address, cluster.model, Path(cluster.model).name, {str(thinks): -100}
    )
