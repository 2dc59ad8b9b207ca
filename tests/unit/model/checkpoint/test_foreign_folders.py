"""What people name in place of a checkpoint: one sentence says what it is and what to do instead."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moiety.errors import CheckpointError
from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.checkpoint.side_files import INDEX_FILE
from moiety.model.hub import local_folder

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
ADAPTER = json.dumps({"base_model_name_or_path": "maker/base"})
# files of the folder, by name -> the sentence
FOREIGN = {
    "empty": ({}, "is empty: name a folder with config.json and safetensors"),
    "GGUF": (
        {"m-Q4.gguf": "GGUF", "config.json": "{}"},
        r"holds GGUF, the format of llama\.cpp: serve the safetensors",
    ),
    "ONNX": ({"model.onnx": "x", "config.json": "{}"}, "holds an ONNX export: serve"),
    "TensorRT": ({"rank0.engine": "x", "config.json": "{}"}, "holds a TensorRT-LLM engine.*: serve"),
    "adapter": (
        {"adapter_config.json": ADAPTER, "adapter_model.safetensors": ""},
        "LoRA adapter for maker/base.*merge it",
    ),
    "adapter beside": (
        {"adapter_config.json": ADAPTER, "config.json": "{}", "model.safetensors": ""},
        "if .* is merged",
    ),
    "pickles": ({"pytorch_model.bin": "x", "config.json": "{}"}, r"pickles .* convert them once: .*save_pretrained"),
    "Meta": ({"consolidated.00.pth": "x", "params.json": "{}"}, "maker's own layout.*: serve the copy"),
    "one level too high": ({"model/config.json": "{}"}, r"but \S+/model in it is: name that folder"),
    "cache": (
        {"refs/main": "abc", "snapshots/ab/config.json": "{}", "snapshots/abc/config.json": "{}"},
        "/abc in it is",
    ),
    "begun": ({"config.json": "{}", ".cache/huggingface/download/x.incomplete": ""}, r"not complete \(x\.incomplete\)"),
    "no index": ({"config.json": "{}", "model-1-of-2.safetensors": ""}, "only model-1-of-2.*: download the index too"),
    "pointers": ({"config.json": "{}", "model.safetensors": POINTER}, r"pointers of Git LFS .*: run `git lfs pull`"),
    "a pointer": ({"config.json": POINTER, "model.safetensors": ""}, r"config\.json: is a pointer of Git LFS"),
}


@pytest.mark.parametrize(("files", "sentence"), FOREIGN.values(), ids=FOREIGN)
def test_a_folder_that_is_no_checkpoint(files: dict[str, str], sentence: str, tmp_path: Path) -> None:
    """The error names the folder, what it holds, and what to do instead."""
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=rf"{tmp_path}.*{sentence}"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("m.gguf", "is GGUF"),
        ("model.safetensors", "is one file of a checkpoint: name its folder, /"),
        ("x.txt", "is a file: name the folder"),
    ],
)
def test_a_file_instead_of_a_folder(name: str, sentence: str, tmp_path: Path) -> None:
    """A file is named as what it is, wherever a model can be named."""
    (tmp_path / name).write_bytes(b"x")
    for opened in (Checkpoint.open, lambda path: local_folder(path, say=print)):
        with pytest.raises(CheckpointError, match=rf"{name}: {sentence}"):
            opened(str(tmp_path / name))


def test_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    """A link is named as what it is, wherever a model can be named."""
    (tmp_path / "m").symlink_to("m")
    for opened in (Checkpoint.open, lambda path: local_folder(path, say=print)):
        with pytest.raises(CheckpointError, match=r"/m: is a symbolic link that leads back to itself"):
            opened(str(tmp_path / "m"))


@pytest.mark.parametrize("path", ["maker/tiny", "maker\0"])
def test_what_no_file_can_be(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is called like the owner of an id hides no model; a name that no path can have is a missing folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    Path("maker").touch()
    with pytest.raises(CheckpointError, match=r"no such folder"):
        Checkpoint.open(path)
    with pytest.raises(CheckpointError, match=r"not in the cache|neither a folder here nor"):
        local_folder(path, say=print)


def test_a_download_that_broke_off(tiny: Callable[[str], str], tmp_path: Path) -> None:
    """Missing shards are counted and named, with the file that was begun."""
    folder = shutil.copytree(tiny("mixtral"), tmp_path / "copy")
    index = json.loads((folder / INDEX_FILE).read_text())
    index["weight_map"]["x"] = "model-99.safetensors"
    (folder / INDEX_FILE).write_text(json.dumps(index))
    (folder / "model-99.safetensors.incomplete").touch()
    with pytest.raises(
        CheckpointError, match=r"1 of the \d+ shards .* model-99\.safetensors is missing \(model-99\S+ is not complete"
    ):
        Checkpoint.open(folder)
