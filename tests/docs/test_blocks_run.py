"""Marked blocks of Markdown files do what they say when pasted, by the tables of `pasted.py`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing
from itertools import takewhile
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from markdown_blocks import Block, Marker, all_blocks
from pasted import CHECKPOINTS, HUB_ID, Pasted

from moiety.synthetic import write_tiny
from support.hub_server import HubServer
from support.serving import Served

OTHERS = ("curl", "redis-cli")  # programs that Moiety does not bring
MARKED: list[tuple[Block, Marker]] = [(block, block.marker) for block in all_blocks() if block.marker is not None]
ALONE = [block for block, marker in MARKED if not marker.beside and not marker.until]
BESIDE = [block for block, marker in MARKED if marker.beside and not marker.slow]
SERVERS = [block for block, marker in MARKED if marker.until]


def skip_without_programs(block: Block) -> None:
    """Skips the test where this machine lacks one of OTHERS that `block` names."""
    missing = [name for name in OTHERS if f"{name} " in block.script and shutil.which(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")


def beside(server: Block) -> list[Block]:
    """Returns the blocks that run beside `server`: those of its page up to the next one that starts a server."""
    here = [(block, marker) for block, marker in MARKED if block.file == server.file and block.line > server.line]
    until_next = takewhile(lambda pair: not pair[1].until, here)
    return [block for block, marker in until_next if marker.beside]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mixtral with a chat template."""
    return write_tiny("mixtral", tmp_path_factory.mktemp("mixtral_chat"), chat=True)


@pytest.fixture
def pasted(tmp_path: Path, checkpoint: Path) -> Iterator[Pasted]:
    """A fresh folder in which the checkpoints of the pages are tiny ones, also those from Hugging Face."""
    for name in CHECKPOINTS:
        shutil.copytree(checkpoint, tmp_path / name)
    with HubServer(checkpoint, HUB_ID) as hub, closing(Pasted(tmp_path, {"HF_ENDPOINT": hub.endpoint})) as pasted:
        yield pasted


@pytest.mark.parametrize(
    "block",
    [pytest.param(each, marks=pytest.mark.slow if each.marker and each.marker.slow else ()) for each in ALONE],
    ids=str,
)
@pytest.mark.timeout(600)
def test_a_block_runs(block: Block, pasted: Pasted) -> None:
    """A block that needs nothing else runs to its end without an error. Over 20 s where it starts a Ray or a system."""
    pasted.run(block)


@pytest.mark.parametrize("block", BESIDE, ids=str)
def test_a_block_runs_against_a_system(block: Block, tmp_path: Path, chat_served: Served) -> None:
    """A client's block gets its answer from a running system without an error."""
    skip_without_programs(block)
    cluster = chat_served.cluster
    redis = urlsplit(chat_served.redis.url)
    texts = {
        HUB_ID: Path(cluster.model).name,
        "127.0.0.1:50051": cluster.address,
        "127.0.0.1:50080": cluster.http_address,
        "-p PORT": f"-p {redis.port}",
        "{APP}": f"{{{cluster.system.app}}}",
        ":KEY:": f":{cluster.system.key}:",
    }
    with closing(Pasted(tmp_path, texts=texts)) as pasted:
        pasted.run(block)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("server", SERVERS, ids=str)
def test_a_page_runs_from_its_server_to_its_clients(server: Block, pasted: Pasted) -> None:
    """A system that a page starts serves the page's blocks behind it and leaves no process. Over 20 s: it starts Ray."""
    with pasted.running(server):
        for block in beside(server):
            skip_without_programs(block)
            pasted.run(block)


def test_some_blocks_are_marked() -> None:
    """There are blocks of every kind, so that no test here is empty."""
    assert ALONE
    assert BESIDE
    assert SERVERS
    assert all(beside(server) for server in SERVERS)
