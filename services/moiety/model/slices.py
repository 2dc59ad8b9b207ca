"""Reads the weights of chosen experts out of a checkpoint, and nothing else of it.

Plain positioned reads into the tensors' own memory, not a mapping: resident memory stays at the weights' size, and a
file that shrinks under a replica is an error here instead of a SIGBUS there. Imports torch, never transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import torch

from moiety.errors import CheckpointError
from moiety.model.checkpoint import Checkpoint
from moiety.model.headers import TensorEntry
from moiety.model.layout import EXPERT, ExpertLayout
from moiety_kernels import ExpertWeights

STORED: Mapping[str, torch.dtype] = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def load_experts(
    checkpoint: Checkpoint,
    layout: ExpertLayout,
    held: Iterable[tuple[int, int]],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    int8: bool = False,
) -> dict[tuple[int, int], ExpertWeights]:
    """(MoE layer ordinal, expert) -> weights in `dtype` on `device`, for each pair of `held` (an ExpertSet is one).

    Matrices are [out, in], also where they are published the other way around; with `int8` they are quantised.

    Raises CheckpointError for a pair the model does not have and for a tensor that is missing or cannot be read.
    """
    loaded: dict[tuple[int, int], ExpertWeights] = {}
    with ExitStack() as stack:
        files: dict[Path, BinaryIO] = {}
        for layer, expert in sorted(held):
            if not (0 <= layer < layout.shape.moe_layers and 0 <= expert < layout.shape.experts):
                raise CheckpointError(
                    f"checkpoint {checkpoint.path} has no expert {expert} in MoE layer {layer}: "
                    f"it has {layout.shape.moe_layers} layers of {layout.shape.experts}"
                )
            parameters = {
                field: _read([_slice_of(checkpoint, layout, name, expert) for name in names], dtype, files, stack)
                for field, names in layout.layers[layer].sources.items()
            }
            for field in layout.layers[layer].transposed:
                parameters[field] = parameters[field].T.contiguous()
            weights = ExpertWeights(**{field: value.to(device) for field, value in parameters.items()})
            loaded[layer, expert] = weights.quantised() if int8 else weights
    return loaded


def _slice_of(checkpoint: Checkpoint, layout: ExpertLayout, name: str, expert: int) -> TensorEntry:
    """One expert's share of a source: a tensor of its own, or a run of rows of a fused one."""
    entry = checkpoint.tensor(name.replace(EXPERT, str(expert)))
    if EXPERT in name:
        return entry
    experts = layout.shape.experts
    size = (entry.end - entry.start) // experts
    start = entry.start + expert * size
    # [E, ...], or (DBRX) the rows of all experts below each other, [E * rows, ...]
    shape = entry.shape[1:] if entry.shape[0] == experts else (entry.shape[0] // experts, *entry.shape[1:])
    return TensorEntry(entry.file, entry.dtype, shape, start, start + size)


def _read(
    entries: list[TensorEntry], dtype: torch.dtype, files: dict[Path, BinaryIO], stack: ExitStack
) -> torch.Tensor:
    """The entries' tensors concatenated along dim 0, in `dtype`."""
    rows = sum(entry.shape[0] for entry in entries)
    out = torch.empty((rows, *entries[0].shape[1:]), dtype=dtype)
    start = 0
    for entry in entries:
        part = out[start : start + entry.shape[0]]
        stored = STORED.get(entry.dtype)
        if stored is None:
            raise CheckpointError(f"{entry.file}: experts stored as {entry.dtype} cannot be served")
        target = part if stored is dtype else torch.empty(entry.shape, dtype=stored)
        try:
            if entry.file not in files:
                files[entry.file] = stack.enter_context(entry.file.open("rb", buffering=0))
            _fill(target, files[entry.file], entry)
        except OSError as error:
            raise CheckpointError(f"{entry.file}: cannot be read: {error}") from error
        if target is not part:
            part.copy_(target)
        start += entry.shape[0]
    return out


def _fill(target: torch.Tensor, file: BinaryIO, entry: TensorEntry) -> None:
    """Reads the entry's bytes into the contiguous `target`."""
    view = target.view(-1).view(torch.uint8).numpy().data
    file.seek(entry.start)
    while view:  # one read call returns at most 2 GiB
        count = file.readinto(view)  # type: ignore[attr-defined]  # raw files have it
        if not count:
            raise CheckpointError(f"{entry.file}: truncated: it ends before byte {entry.end}")
        view = view[count:]
