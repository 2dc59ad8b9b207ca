"""Opening checkpoints: the entries of an intact one, and the error for a damaged one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moiety.errors import CheckpointError
from moiety.model.architectures.transformers_model import load_config
from moiety.model.checkpoint.checkpoint import SINGLE_FILE, Checkpoint
from moiety.model.checkpoint.side_files import INDEX_FILE
from moiety.model.checkpoint.tokenizer import check_tokenizer


@pytest.fixture
def folder(open_tiny, tmp_path: Path) -> Path:
    """A sharded checkpoint that a test may damage."""
    copy = tmp_path / "checkpoint"
    shutil.copytree(open_tiny("mixtral")[0].path, copy)
    return copy


def shards(folder: Path) -> list[Path]:
    """The folder's safetensors files, in order."""
    return sorted(folder.glob("*.safetensors"))


def test_entries_point_at_the_bytes(folder: Path):
    """Every tensor's dtype, shape and byte range agree with what safetensors reads."""
    checkpoint = Checkpoint.open(folder)
    assert len(checkpoint.shards) > 1
    for shard in checkpoint.shards:
        for name, tensor in load_file(shard).items():
            entry = checkpoint.tensor(name)
            assert (entry.file, entry.dtype, entry.shape) == (shard, "F32", tuple(tensor.shape))
            stored = shard.read_bytes()[entry.start : entry.end]
            assert torch.equal(torch.frombuffer(bytearray(stored), dtype=torch.float32).view(tensor.shape), tensor)


def test_a_single_file_needs_no_index(folder: Path, tmp_path: Path):
    """A folder with only model.safetensors opens, too."""
    single = tmp_path / "single"
    single.mkdir()
    shutil.copy(folder / "config.json", single)
    shutil.copy(shards(folder)[0], single / SINGLE_FILE)
    assert Checkpoint.open(single).shards == (single / SINGLE_FILE,)


def remove(name: str) -> Callable[[Path], None]:
    """Damage: removes one file."""
    return lambda folder: (folder / name).unlink()


def rewrite(name: str, content: bytes) -> Callable[[Path], None]:
    """Damage: replaces one file's content."""
    return lambda folder: _write(folder / name, content)


def rewrite_shard(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Damage: changes the first shard's bytes."""
    return lambda folder: _write(shards(folder)[0], change(shards(folder)[0].read_bytes()))


def header(content: bytes) -> bytes:
    """A safetensors file with this header and no weights."""
    return len(content).to_bytes(8, "little") + content


def _write(file: Path, content: bytes) -> None:
    file.write_bytes(content)


def index_names(tensor: str, file: str | None = None) -> Callable[[Path], None]:
    """Damage: makes the index place `tensor` in `file`, by default the first shard."""

    def damage(folder: Path) -> None:
        index = json.loads((folder / INDEX_FILE).read_text())
        index["weight_map"][tensor] = file or shards(folder)[0].name
        (folder / INDEX_FILE).write_text(json.dumps(index))

    return damage


DAMAGES = {
    "no config": (remove("config.json"), "config.json: is missing: copy it from its publisher again$"),
    "config is not JSON": (
        rewrite("config.json", b"{"),
        "not readable as JSON: damaged at line 1, column 2: copy it from its publisher again$",
    ),
    "config is not text": (rewrite("config.json", b"\xff\xfe"), "not readable as JSON: its byte 1 is not UTF-8: copy"),
    "config nests too deep": (rewrite("config.json", b"[" * 100000), "not readable as JSON: it nests too deep: copy"),
    "config is a list": (rewrite("config.json", b"[]"), "holds a list instead of a JSON object: copy it"),
    "config is empty": (rewrite("config.json", b""), "config.json: is empty: copy it from its publisher again$"),
    "no safetensors": (remove(INDEX_FILE), "no safetensors"),
    "an empty index": (rewrite(INDEX_FILE, b"{}"), "holds no weight_map"),
    "a missing shard": (
        lambda folder: shards(folder)[1].unlink(),
        r"1 of the \d+ shards that \S+ names cannot be read: model-00002-of-\S+ is missing; start the download again",
    ),
    "a shard outside the folder": (index_names("x", "../x.safetensors"), "must be a plain file name"),
    "a shard of no name": (index_names("x", "x\0"), "must be a plain file name"),
    "a tensor the shard lacks": (
        index_names("x"),
        r"lacks tensor x, which \S+ places there: download both files again$",
    ),
    "a tensor in two shards": (
        lambda folder: _write(folder / INDEX_FILE, b'{"weight_map": {"x": "a", "y": "b", "x": "c"}}'),
        "it states x twice, as 'a' and as 'c': copy it from its publisher again$",
    ),
    "an empty shard": (rewrite_shard(lambda data: b""), "damaged: 0 bytes cannot hold .*: download the file again$"),
    "a header cut short": (rewrite_shard(lambda data: data[:100]), "damaged: 100 bytes cannot hold"),
    "a header that is not JSON": (
        rewrite_shard(lambda data: data[:8] + b"!" + data[9:]),
        "damaged: its .* header is not readable as JSON: damaged at line 1, column 1: download the file again$",
    ),
    "a header that is not text": (rewrite_shard(lambda data: data[:8] + b"\xff" + data[9:]), "its byte 1 is not UTF-8"),
    "a header that nests too deep": (rewrite_shard(lambda data: header(b"[" * 100000)), "JSON: it nests too deep"),
    "a header that is a list": (rewrite_shard(lambda data: header(b"[]")), "header is not a JSON object: download"),
    "a tensor twice in a header": (
        rewrite_shard(lambda data: header(b'{"x": {"dtype": "F32"}, "x": {"dtype": "F16"}}')),
        "it states x twice",
    ),
    "a size that is no integer": (
        rewrite_shard(lambda data: header(b'{"x": {"dtype": "F32", "shape": [1e400], "data_offsets": [0, 4]}}')),
        "does not fit its data_offsets",
    ),
    "a huge header length": (rewrite_shard(lambda data: b"\xff" * 8 + data[8:]), "cannot hold the safetensors header"),
    "missing last byte": (
        rewrite_shard(lambda data: data[:-1]),
        r"truncated: it has \d+ bytes, .*: download the file again$",
    ),
    "an unknown dtype": (
        rewrite_shard(lambda data: data.replace(b'"F32"', b'"F99"', 1)),
        "unknown dtype F99: must be one of",
    ),
    "a wrong shape": (rewrite_shard(lambda data: data.replace(b"[64]", b"[65]", 1)), "does not fit its data_offsets"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_named(folder: Path, damage: Callable[[Path], None], message: str):
    """Opening a damaged folder raises an error that names the file and what is wrong with it."""
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda path: path.mkdir(), "is a folder, not a file"),
        (lambda path: path.symlink_to(path.name), "is a symbolic link that leads back to itself"),
        (lambda path: path.symlink_to("../blobs/x"), r"is a symbolic link to \.\./blobs/x, which is missing"),
    ],
    ids=["a folder", "a loop", "a broken link"],
)
@pytest.mark.parametrize("place", ["config.json", "generation_config.json", INDEX_FILE, "a shard", "tokenizer.json"])
def test_what_is_there_instead_of_a_file(folder: Path, place: str, make: Callable[[Path], None], what: str):
    """A folder, a link to itself and a link to nothing are not called missing, whichever file they replace."""
    file = shards(folder)[1] if place == "a shard" else folder / place
    file.unlink(missing_ok=True)
    make(file)
    with pytest.raises(CheckpointError, match=rf"{file.name}:? {what}.*again"):
        check_tokenizer(folder) if place == "tokenizer.json" else Checkpoint.open(folder)


def test_the_only_shard_is_missing(tmp_path: Path):
    """A single shard is not counted."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / INDEX_FILE).write_text('{"weight_map": {"x": "a.safetensors"}}')
    with pytest.raises(
        CheckpointError, match=rf"the shard that {INDEX_FILE} names cannot be read: a.safetensors is missing"
    ):
        Checkpoint.open(tmp_path)


def test_a_missing_folder_is_named(tmp_path: Path):
    """Opening a path that does not exist raises an error that names it."""
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        Checkpoint.open(tmp_path / "nowhere")


def test_a_field_that_is_null_is_named_by_its_file(folder: Path):
    """What transformers refuses for its type names file, field, value and bound, and no other architecture."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": None}))
    with pytest.raises(CheckpointError, match=r"config\.json: num_hidden_layers = null: must be an integer: copy"):
        load_config(Checkpoint.open(folder))
