"""Writes a checkpoint's safetensors shards and their index, holding one shard's tensors in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch

from moiety.model.checkpoint.side_files import INDEX_FILE

SHARD_BYTES = 256 << 20


def write_shards(folder: Path, weights: Iterable[tuple[str, torch.Tensor]], shard_bytes: int = SHARD_BYTES) -> int:
    """Writes (name, tensor) pairs to the existing `folder`; returns the tensors' total size in bytes.

    A shard holds at most `shard_bytes` of tensors, or one larger tensor.
    """
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}

    def flush() -> None:
        file = folder / f"shard-{len(shards)}"
        file.touch()
        mode = file.stat().st_mode & 0o777  # by the umask: what safetensors writes, only its owner can read
        save_file(pending, file, metadata={"format": "pt"})
        file.chmod(mode)
        shards.append(list(pending))
        pending.clear()

    total = held = 0
    for name, weight in weights:
        if pending and held + weight.nbytes > shard_bytes:
            flush()
            held = 0
        pending[name] = weight
        held += weight.nbytes
        total += weight.nbytes
    flush()

    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")
    return total
