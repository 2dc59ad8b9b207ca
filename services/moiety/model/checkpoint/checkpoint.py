"""Opens a published checkpoint folder: its config and the location of each tensor. Reads no weights.

Imports no torch, safetensors or transformers. `headers.py` reads the header of one safetensors file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moiety.errors import CheckpointError
from moiety.model.checkpoint.headers import TensorEntry, read_header
from moiety.model.checkpoint.quantised import Stored, stored_tensors

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MODELOPT_FILE = "hf_quant_config.json"
AUTOGPTQ_FILE = "quantize_config.json"
EXPERT = "{expert}"  # stands for the expert id in a tensor's name


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint folder: parsed config, shard files in name order, and the location of every tensor.

    `tensors` has the names and shapes of an unquantised checkpoint, even if some tensors are stored quantised.
    `quantization` states how they are stored, as a `quantization_config`; it is empty if no file of the folder states it.
    """

    path: Path
    config: Mapping[str, Any]
    shards: tuple[Path, ...]
    tensors: Mapping[str, Stored]
    quantization: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Reads config, index and safetensors headers.

        Raises CheckpointError if one of them is missing or damaged, or if the quantisation of the weights is unsupported.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise CheckpointError(f"checkpoint {folder}: no such folder")
        config = read_json(folder / "config.json")
        shards, indexed = _shards(folder)
        tensors: dict[str, TensorEntry] = {}
        for shard in shards:
            tensors.update(read_header(shard))
        for name, file in indexed.items():
            if name not in tensors or tensors[name].file != file:
                raise CheckpointError(f"{file}: tensor {name}, which {INDEX_FILE} places there, is missing")
        quantization = _quantization(folder, config)
        stored = stored_tensors(folder, config, quantization, tensors)
        return cls(folder, config, shards, stored, quantization)

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


def read_json(file: Path) -> dict[str, Any]:
    """Reads the JSON object in `file`; raises CheckpointError if the file is missing or holds anything else."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file}: holds a JSON {type(data).__name__}, not an object")
    return data


def _quantization(folder: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns how the weights are quantised, as a `quantization_config`: from config.json, or else from a tool's own file.

    Raises CheckpointError if one of these is no JSON object.
    """
    for name in ("quantization_config", "compression_config"):
        if stated := config.get(name):
            if not isinstance(stated, dict):
                raise CheckpointError(f"{folder / 'config.json'}: {name} is {stated!r}: must be a JSON object")
            return stated
    if (folder / MODELOPT_FILE).is_file():
        stated = read_json(folder / MODELOPT_FILE).get("quantization") or {}
        if not isinstance(stated, dict):
            raise CheckpointError(f"{folder / MODELOPT_FILE}: quantization is {stated!r}: must be a JSON object")
        if stated.get("quant_algo"):  # without one, only the KV cache was meant to be quantised
            return {"quant_method": "modelopt", **stated}
    if (folder / AUTOGPTQ_FILE).is_file():
        return {"quant_method": "gptq", **read_json(folder / AUTOGPTQ_FILE)}
    return {}


def _shards(folder: Path) -> tuple[tuple[Path, ...], dict[str, Path]]:
    """Returns the safetensors files in name order, and each tensor's file as in the index (empty for a single file)."""
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.is_file():  # if both exist, transformers reads the single file
        return (single,), {}
    if not index.is_file():
        raise CheckpointError(f"checkpoint {folder}: no safetensors: found neither {SINGLE_FILE} nor {INDEX_FILE}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: holds no weight_map")
    for name in sorted(set(map(str, weight_map.values()))):
        if Path(name).name != name:
            raise CheckpointError(f"{index}: shard {name!r} must be a plain file name")
        if not (folder / name).is_file():
            raise CheckpointError(f"checkpoint {folder}: shard {name}, named by {INDEX_FILE}, is missing")
    indexed = {str(tensor): folder / str(name) for tensor, name in weight_map.items()}
    return tuple(sorted(set(indexed.values()))), indexed
