"""Models by their Hugging Face id: what is downloaded, what is kept, and what is said when it cannot be had."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moiety.cli.main import run
from moiety.errors import CheckpointError
from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.hub import is_model_id, local_folder, needed_files
from support.hub_server import COMMIT, HubServer, pointed_at

SURPLUS = ("pytorch_model.bin", "model.gguf", "modeling_x.py", "original/consolidated.safetensors", "README.md")


def quiet(_: str) -> None:
    """Says nothing."""


@pytest.fixture
def published(tiny: Callable[[str], str], tmp_path: Path) -> Path:
    """A tiny checkpoint as it is published: with files beside it that serving does not read."""
    folder = tmp_path / "published"
    shutil.copytree(tiny("qwen3_moe"), folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/rag.jinja").write_text("{{ documents }}")
    for name in SURPLUS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"surplus")
    return folder


@pytest.fixture
def hub(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub that serves `published`, and an empty cache; huggingface_hub uses both."""
    with HubServer(published) as server, pointed_at(monkeypatch, server.endpoint, tmp_path / "cache"):
        yield server


def test_a_folder_is_returned_as_it_is(tmp_path: Path) -> None:
    """A folder needs no network, and has no revisions."""
    assert local_folder(str(tmp_path), say=quiet) == tmp_path
    with pytest.raises(CheckpointError, match=r"is a folder, so it has no revision main"):
        local_folder(str(tmp_path), "main", say=quiet)


@pytest.mark.parametrize("model", ["tiny", "./maker/tiny", "a/b/c", "maker/..", "", "maker/", "~/maker", "maker/ti ny"])
def test_neither_folder_nor_id(model: str) -> None:
    """What is neither is refused without asking the hub, with both ways named."""
    assert not is_model_id(model)
    with pytest.raises(CheckpointError, match=r"neither a folder here nor a Hugging Face id"):
        local_folder(model, say=quiet)


def test_only_what_is_needed_is_downloaded(hub: HubServer, published: Path) -> None:
    """The folder holds weights, config, tokenizer and templates, byte for byte, and nothing else; `say` names the size."""
    said: list[str] = []
    folder = local_folder(hub.model, say=said.append)
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == hub.files().keys() - set(SURPLUS)
    assert hub.downloads == found
    assert all((folder / name).read_bytes() == (published / name).read_bytes() for name in found)
    assert Checkpoint.open(folder).architecture == "qwen3_moe"
    assert said[0].startswith(f"{hub.model}: downloading {len(found)} files")


def test_the_second_call_needs_no_network(hub: HubServer) -> None:
    """What is in the cache is used when the hub cannot be reached, and not downloaded again when it can."""
    first = local_folder(hub.model, say=quiet)
    before = len(hub.requests)
    assert local_folder(hub.model, say=quiet) == first
    assert len(hub.requests) == before
    hub.stop()
    said: list[str] = []
    assert local_folder(hub.model, say=said.append) == first
    assert "cannot be reached; using the copy in" in said[0]
    assert local_folder(hub.model, COMMIT, say=quiet) == first


def test_a_broken_connection_is_resumed(hub: HubServer) -> None:
    """After a connection that broke within a file, the rest of the file is asked for, not the whole."""
    hub.break_at = 60_000
    folder = local_folder(hub.model, say=quiet)
    resumed = [(name, first) for method, name, first in hub.requests if method == "GET" and first]
    assert hub.breaks == len(resumed) == 1
    ((name, first),) = resumed
    assert 0 < first <= hub.break_at
    assert (folder / name).read_bytes() == hub.files()[name]


def test_complete_files_are_kept(hub: HubServer, published: Path, tmp_path: Path) -> None:
    """A download that was cut off goes on with the files that are missing, and is no checkpoint until they are there."""
    folder = local_folder(hub.model, say=quiet)
    shard = next(folder.glob("*.safetensors"))
    shard.resolve().unlink()
    shard.unlink()
    hub.requests.clear()
    assert local_folder(hub.model, say=quiet) == folder
    assert hub.downloads == {shard.name}
    shard.resolve().unlink()
    shard.unlink()
    hub.stop()
    with pytest.raises(CheckpointError, match=r"has no complete copy"):
        local_folder(hub.model, say=quiet)


def test_an_interrupted_download(hub: HubServer, tmp_path: Path) -> None:
    """Ctrl-C within a file ends the command with status 130 and leaves no part of a file; the next call completes it."""
    hub.break_at, hub.halfway = 60_000, lambda: os.kill(os.getpid(), signal.SIGINT)
    assert run(["inspect", hub.model]) == 130
    assert hub.breaks == 1
    assert not list((tmp_path / "cache").rglob("*.incomplete"))
    assert Checkpoint.open(local_folder(hub.model, say=quiet)).architecture == "qwen3_moe"


def test_an_unknown_model_or_revision(hub: HubServer) -> None:
    """The error names the hub, and what to do where the model is private."""
    with pytest.raises(CheckpointError, match=r"maker/other: neither a folder here nor a model at .*hf auth login"):
        local_folder("maker/other", say=quiet)
    with pytest.raises(CheckpointError, match=r"maker/tiny: has no revision v9 at http://127"):
        local_folder(hub.model, "v9", say=quiet)


def test_a_restricted_model(hub: HubServer) -> None:
    """A model whose files are refused names the page of its conditions, and the login."""
    hub.gated = True
    with pytest.raises(CheckpointError, match=r"restricts access; accept the conditions at .*/maker/tiny, then run"):
        local_folder(hub.model, say=quiet)


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without network and copy, the error says what to do here or elsewhere; in offline mode, it names the variable."""
    with pointed_at(monkeypatch, "http://127.0.0.1:9", tmp_path):
        with pytest.raises(
            CheckpointError,
            match=r"127.0.0.1:9 cannot be reached: .*HF_ENDPOINT.* `hf download maker/tiny --revision v1 --local-dir FOLDER`",
        ):
            local_folder("maker/tiny", "v1", say=quiet)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(
            CheckpointError, match=r"not in the cache .*HF_HUB_OFFLINE is set: unset it, or name a folder"
        ):
            local_folder("maker/tiny", say=quiet)


def test_a_disk_that_is_too_small(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that does not fit is refused before a file is downloaded, with both sizes."""
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match=r"needs 0.0 GB more, but the disk of .* has 0.0 GB free; HF_HOME"):
        local_folder(hub.model, say=quiet)
    assert not hub.downloads


def test_no_safetensors(hub: HubServer, published: Path) -> None:
    """A model without safetensors is refused before a file is downloaded, with what it holds and what to do instead."""
    for shard in published.glob("*.safetensors"):
        shard.unlink()
    with pytest.raises(CheckpointError, match=r"has no safetensors at .*; it holds GGUF, .*: serve the safetensors"):
        local_folder(hub.model, say=quiet)
    assert not hub.downloads


@pytest.mark.parametrize(
    ("names", "needed"),
    [
        (("model.safetensors", "model-00001-of-00002.safetensors"), {"model.safetensors"}),
        (("model-1.safetensors", "consolidated.safetensors", "adapter_model.safetensors"), {"model-1.safetensors"}),
        (
            ("tokenizer.model.v3", "tokenizer_config.json", "params.json"),
            {"tokenizer.model.v3", "tokenizer_config.json"},
        ),
        (("metal/model.bin", "onnx/config.json", "original/model.safetensors"), set()),
        (("hf_quant_config.json", "training_args.bin", "optimizer.pt", "a.msgpack"), {"hf_quant_config.json"}),
    ],
)
def test_needed_files(names: tuple[str, ...], needed: set[str]) -> None:
    """Of several copies of the weights one is chosen; files in folders, code and pickles are left out."""
    assert set(needed_files(names)) == needed


def test_commands_take_an_id(hub: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    """`moiety inspect maker/tiny` downloads and reports; progress goes to stderr, and a wrong name is wrong usage."""
    assert run(["inspect", hub.model, "--revision", "main"]) == 0
    output = capsys.readouterr()
    assert "with 16 experts, top 4" in output.out
    assert "downloading" in output.err
    assert run(["serve", "no-such-folder"]) == 2
    assert "'no-such-folder': neither a folder nor a Hugging Face id" in capsys.readouterr().err
    assert run(["serve", hub.model, "--groups", "99"]) == 1
    assert "setting groups = 99: must be 1 to 16" in capsys.readouterr().err
