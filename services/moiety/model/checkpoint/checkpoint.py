"""Opens a published checkpoint folder: its config and the location of each tensor. Reads no weights.

Imports no torch, safetensors or transformers. `headers.py` reads the header of one safetensors file, `side_files.py` the
JSON files beside them; `foreign.py` says what a folder is that is no checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moiety.errors import CheckpointError
from moiety.model.checkpoint.files import AGAIN, instead_of_file, is_pointer, present, unreadable
from moiety.model.checkpoint.foreign import (
    SHARDS,
    file_instead_of_folder,
    folder_problem,
    listed,
    partial_files,
)
from moiety.model.checkpoint.headers import TensorEntry, read_header
from moiety.model.checkpoint.quantised import Stored, stored_tensors
from moiety.model.checkpoint.side_files import (
    AUTOAWQ_FILE,
    AUTOGPTQ_FILE,
    CONFIG_FILE,
    INDEX_FILE,
    MODEL_FILES,
    MODELOPT_FILE,
    check_side_files,
    read_side_file,
    text_config,
    warn,
)

SINGLE_FILE = "model.safetensors"
EXPERT = "{expert}"  # stands for the expert id in a tensor's name


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint folder: parsed config, shard files in name order, and the location of every tensor.

    `tensors` has the names and shapes of an unquantised checkpoint, even if some tensors are stored quantised.
    `quantization` states how they are stored, as a `quantization_config`; it is empty if no file of the folder states it.
    `repeated` are the stored tensors that more than one shard holds; the index says which of them counts.
    """

    path: Path
    config: Mapping[str, Any]
    shards: tuple[Path, ...]
    tensors: Mapping[str, Stored]
    quantization: Mapping[str, Any] = field(default_factory=dict)
    repeated: frozenset[str] = frozenset()

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Reads config, index and safetensors headers, and checks the JSON files that the model is read from.

        Raises CheckpointError if one of them is missing or damaged, if the quantisation of the weights is unsupported, or if
        the path is something else: the error says what it is and what to do.
        """
        folder = Path(path)
        _check_kind(folder)
        if not present(folder / CONFIG_FILE):
            raise CheckpointError(f"{folder / CONFIG_FILE}: is missing: {AGAIN}")
        check_side_files(folder, MODEL_FILES)
        config = read_side_file(folder, CONFIG_FILE)
        shards, indexed = _shards(folder)
        tensors, repeated = _located(shards, indexed)
        quantization = _quantization(folder, config)
        stored = stored_tensors(folder, config, quantization, tensors)
        return cls(folder, config, shards, stored, quantization, repeated)

    @property
    def architecture(self) -> str:
        """The config's `model_type`, by which transformers names architectures; `unknown` if the config has none."""
        return str(self.config.get("model_type", "unknown"))

    def tensor(self, name: str) -> Stored:
        """Returns where the tensor `name` is stored, without reading it. Raises CheckpointError if the checkpoint lacks it."""
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"checkpoint {self.path}: tensor {name} is missing") from None


def _check_kind(folder: Path) -> None:
    """Raises CheckpointError if the path is no folder that could be a checkpoint."""
    try:
        if not folder.is_dir():
            if not present(folder):
                raise CheckpointError(f"checkpoint {folder}: no such folder")
            raise CheckpointError(f"{folder}: {file_instead_of_folder(folder)}")
        if problem := folder_problem(folder):
            raise CheckpointError(f"checkpoint {folder}: {problem}")
    except OSError as error:
        raise CheckpointError(f"checkpoint {folder}: {unreadable(error)}") from error


def _quantization(folder: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns how the weights are quantised, as a `quantization_config`: from config.json, or else from a tool's own file.

    A multimodal config may state it for its language model. Raises CheckpointError if one of the files is damaged.
    """
    for part in (config, text_config(config)):
        for name in ("quantization_config", "compression_config"):
            if stated := part.get(name):
                return dict(stated)
    stated = read_side_file(folder, MODELOPT_FILE).get("quantization") or {}
    if stated.get("quant_algo"):  # without one, only the KV cache was meant to be quantised
        return {"quant_method": "modelopt", **stated}
    if present(folder / AUTOGPTQ_FILE):
        return {"quant_method": "gptq", **read_side_file(folder, AUTOGPTQ_FILE)}
    if bits := (stated := read_side_file(folder, AUTOAWQ_FILE)).get("w_bit"):
        return {"quant_method": "awq", "bits": bits, **stated}
    return {}


def _shards(folder: Path) -> tuple[tuple[Path, ...], dict[str, Path]]:
    """Returns the safetensors files in name order, and each tensor's file as in the index (empty for a single file)."""
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if present(single):  # if both exist, transformers reads the single file
        if present(index) and (others := {*_indexed(index).values()} - {SINGLE_FILE}):
            warn(f"{index}: names {listed(sorted(others))}, but {SINGLE_FILE} is read, as in transformers")
        return (single,), {}
    if not present(index):
        found = sorted(path.name for path in folder.glob(SHARDS))
        besides = f", only {listed(found)}: download the index too" if found else ""
        raise CheckpointError(
            f"checkpoint {folder}: no safetensors: found neither {SINGLE_FILE} nor {INDEX_FILE}{besides}"
        )
    weight_map = _indexed(index)
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or not name or "\0" in name:
            raise CheckpointError(f"{index}: shard {name!r} must be a plain file name")
    if absent := [f"{name} {what}" for name in names if (what := instead_of_file(folder / name))]:
        begun = f" ({listed(partial)} is not complete)" if (partial := partial_files(folder)) else ""
        count = f"{len(absent)} of the {len(names)} shards" if len(names) > 1 else "the shard"
        raise CheckpointError(
            f"checkpoint {folder}: {count} that {INDEX_FILE} names cannot be read: {listed(absent)}{begun}; "
            "start the download again, complete files are kept"
        )
    return tuple(folder / name for name in names), {tensor: folder / name for tensor, name in weight_map.items()}


def _indexed(index: Path) -> dict[str, str]:
    """Returns the name of each tensor's shard. Raises CheckpointError if the index is damaged."""
    weight_map = read_side_file(index.parent, index.name).get("weight_map")
    if not weight_map:
        raise CheckpointError(f"{index}: holds no weight_map")
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{index}: weight_map.{tensor} = {name!r}: must be the name of a file")
    return dict(weight_map)


def _located(shards: tuple[Path, ...], indexed: Mapping[str, Path]) -> tuple[dict[str, TensorEntry], frozenset[str]]:
    """Returns where each tensor lies, and which tensors lie in several shards: there the index decides.

    Raises CheckpointError if a header is damaged, or if the index places a tensor where it is not.
    """
    tensors: dict[str, TensorEntry] = {}
    repeated: set[str] = set()
    missing = dict(indexed)
    if pointers := [shard.name for shard in shards if is_pointer(shard)]:
        raise CheckpointError(
            f"checkpoint {shards[0].parent}: holds pointers of Git LFS instead of weights ({listed(pointers)}): "
            "run `git lfs pull` in it"
        )
    for shard in shards:
        for name, entry in read_header(shard).items():
            if name in tensors:
                repeated.add(name)
            if indexed.get(name) == shard:
                missing.pop(name, None)
            if name not in tensors or indexed.get(name) in (shard, None):
                tensors[name] = entry
    for name, file in missing.items():
        others = sum(place == file for place in missing.values()) - 1
        lacks = f"tensor {name}" + (f" and {others} more" if others else "")
        raise CheckpointError(f"{file}: lacks {lacks}, which {INDEX_FILE} places there: download both files again")
    return tensors, frozenset(repeated)
