"""Fixtures that all tests share, made once a session: a layout cache, tiny checkpoints, one served system."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

# Ray reads these when it is first imported, by any test: they make it listen on loopback only and ask for no token.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")


from moiety.gateway.text.tokenizer import Tokenizer
from moiety.local.cluster import LocalCluster
from moiety.model.checkpoint.chat_template import ChatTemplate
from moiety.registry.embedded_redis import EmbeddedRedis
from moiety.synthetic import write_tiny
from moiety.synthetic.tokenizer import write_chat_tokenizer
from moiety.tools.trace.receiver import TraceReceiver
from support.doors import ChatDoor, door_over
from support.interpreter import import_interpreted
from support.serving import Served

import_interpreted()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where tests run in several processes, gives each whole files, and one of them all tests of the session's systems."""
    for item in items:
        systems = {"served", "chat_served"} & set(getattr(item, "fixturenames", ()))
        item.add_marker(pytest.mark.xdist_group("systems" if systems else item.path.name))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Makes the tests, and the processes they start, keep derived layouts in a folder of this session."""
    before = os.environ.get("MOIETY_CACHE")
    os.environ["MOIETY_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["MOIETY_CACHE"]
    else:
        os.environ["MOIETY_CACHE"] = before


@pytest.fixture(scope="session", autouse=True)
def own_runtime_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Makes the tests, and the processes they start, neither see nor record systems beside those of other sessions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("runtime")))
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Returns the folder of an architecture's tiny random checkpoint, in its publisher's layout; made once."""
    folders: dict[str, Path] = {}

    def folder(architecture: str) -> str:
        if architecture not in folders:
            folders[architecture] = write_tiny(architecture, tmp_path_factory.mktemp(architecture))
        return str(folders[architecture])

    return folder


@pytest.fixture(scope="session")
def served(tiny: Callable[[str], str]) -> Iterator[Served]:
    """Serves qwen3_moe in fp32 with two expert groups, one router and one gateway, for the whole session."""
    with _serving(tiny("qwen3_moe")) as system:
        yield system


@pytest.fixture(scope="session")
def chat_served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Serves a chat model with tools, like `served`; its context takes a conversation with tools."""
    folder = tmp_path_factory.mktemp("qwen3_moe_chat")
    with _serving(str(write_tiny("qwen3_moe", folder, chat=True, max_position_embeddings=4096))) as system:
        yield system


@contextmanager
def _serving(model: str) -> Iterator[Served]:
    """Serves the checkpoint `model` in fp32 with two expert groups, one router and one gateway."""
    with TraceReceiver() as receiver, EmbeddedRedis() as redis, asyncio.Runner() as runner:
        cluster = LocalCluster(
            model,
            dtype="float32",
            registry=redis.url,
            env={
                "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint,
                "OTEL_BSP_SCHEDULE_DELAY": "200",
                "OTEL_METRIC_EXPORT_INTERVAL": "1000",
            },
        )
        runner.run(cluster.__aenter__())
        try:
            yield Served(cluster, receiver, redis, runner)
        finally:
            runner.run(cluster.stop())


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tokenizer whose chat template knows tools, in the Hermes format."""
    made = tmp_path_factory.mktemp("chat-tokenizer")
    write_chat_tokenizer(made)
    return str(made)


@pytest.fixture(scope="session")
def chat_tokenizer(chat_folder: str) -> Tokenizer:
    """The tokenizer of `chat_folder`."""
    return Tokenizer(chat_folder)


@pytest.fixture(scope="session")
def chat_template(chat_tokenizer: Tokenizer) -> Iterator[ChatTemplate]:
    """The chat template of `chat_folder`."""
    template = chat_tokenizer.chat_template()
    assert template is not None
    yield template
    template.close()


@pytest.fixture
def chat_door(chat_tokenizer: Tokenizer, chat_template: ChatTemplate) -> ChatDoor:
    """Opens gateways that serve the chat model over the engines that it gets."""
    return partial(door_over, chat_tokenizer, template=chat_template)
