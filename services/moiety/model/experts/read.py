"""Reads the weights of chosen experts out of a checkpoint, and nothing else of it; quantised ones as they are published.

Imports torch, never transformers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from contextlib import suppress

import torch

from moiety.errors import CheckpointError
from moiety.model.checkpoint.checkpoint import EXPERT, Checkpoint
from moiety.model.checkpoint.headers import TensorEntry
from moiety.model.checkpoint.quantised import QuantisedEntry, Stored
from moiety.model.checkpoint.reading import FLOATS, Reader, of_expert
from moiety.model.experts.layout import ExpertLayout
from moiety.model.experts.slicing import slice_of
from moiety_kernels import ExpertWeights, Matrix
from moiety_kernels.weights.combine import joined
from moiety_kernels.weights.expert_weights import dequantised

GIVE_BACK = 32  # experts between returns of freed memory to the system


def load_experts(
    checkpoint: Checkpoint,
    layout: ExpertLayout,
    held: Iterable[tuple[int, int]],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    int8: bool = False,
    slices: int = 1,
) -> dict[tuple[int, int], ExpertWeights]:
    """(MoE layer ordinal, expert) -> weights in `dtype` on `device`, for each pair of `held` (an ExpertSet is one).

    Matrices are [out, in], also where they are published the other way around. Those published quantised stay so; with
    `int8` the others are quantised, too. With `slices` above 1, `held` names slices as `ModelShape.sliced` does; an expert
    is read whole, and its slice is kept, of its values where it is published quantised.

    Raises CheckpointError for a pair the model does not have and for a tensor that is missing or cannot be read.
    """
    loaded: dict[tuple[int, int], ExpertWeights] = {}
    with Reader() as reader:
        for count, (layer, number) in enumerate(sorted(held)):
            if count % GIVE_BACK == 0:
                _give_back()
            expert, part = divmod(number, slices)
            weights = load_expert(reader, checkpoint, layout, layer, expert, dtype)
            if slices > 1:
                weights = slice_of(weights, layout.shape.mlp, part, slices, dtype)
            weights = weights.to(device)
            loaded[layer, number] = weights.quantised(rounds_rows=True) if int8 else weights
            del weights
    _give_back()
    return loaded


def _give_back() -> None:
    """Returns freed memory to the system: what conversions leave between the weights glibc would keep, a quarter of them."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def load_expert(
    reader: Reader,
    checkpoint: Checkpoint,
    layout: ExpertLayout,
    layer: int,
    expert: int,
    dtype: torch.dtype,
) -> ExpertWeights:
    """One expert of MoE layer `layer`, whole and on CPU: see `load_experts`."""
    shape = layout.shape
    if not (0 <= layer < shape.moe_layers and 0 <= expert < shape.experts):
        raise CheckpointError(
            f"checkpoint {checkpoint.path} has no expert {expert} in MoE layer {layer}: "
            f"it has {shape.moe_layers} layers of {shape.experts}"
        )
    read: dict[str, Matrix] = {}
    of_layer = layout.layers[layer]
    for field, names in of_layer.sources.items():
        entries = [_entry(checkpoint, layout, name, expert) for name in names]
        read[field] = _read(reader, entries, dtype, transposed=field in of_layer.transposed)
    gate_up, down = read["gate_up"], read["down"]
    if type(gate_up) is not type(down):  # one kernel computes both
        gate_up, down = dequantised(gate_up, dtype), dequantised(down, dtype)
    biases = (read.get("gate_up_bias"), read.get("down_bias"))
    return ExpertWeights(gate_up, down, *(None if bias is None else dequantised(bias, dtype) for bias in biases))


def _entry(checkpoint: Checkpoint, layout: ExpertLayout, name: str, expert: int) -> Stored:
    """One expert's share of a source: a tensor of its own, or a run of rows of a fused one."""
    entry = checkpoint.tensor(name.replace(EXPERT, str(expert)))
    return entry if EXPERT in name else of_expert(entry, expert, layout.shape.experts)


def _read(reader: Reader, entries: list[Stored], dtype: torch.dtype, *, transposed: bool) -> Matrix:
    """The entries' matrices one below the other, quantised if all are, else in `dtype`."""
    quantised = [entry for entry in entries if isinstance(entry, QuantisedEntry)]
    if len(quantised) == len(entries):
        try:
            return joined([reader.matrix(entry) for entry in quantised])
        except ValueError:  # some have zero points, or other groups: rare enough for their plain values
            return torch.cat([reader.values(entry, dtype) for entry in entries])
    if quantised:
        return torch.cat([reader.values(entry, dtype) for entry in entries])
    plain = [entry for entry in entries if isinstance(entry, TensorEntry)]
    matrix = _read_plain(reader, plain, dtype)
    return matrix.T.contiguous() if transposed else matrix


def _read_plain(reader: Reader, entries: list[TensorEntry], dtype: torch.dtype) -> torch.Tensor:
    """The entries' tensors concatenated along dim 0, in `dtype`, without a second copy where they are stored in it."""
    rows = sum(entry.shape[0] for entry in entries)
    out = torch.empty((rows, *entries[0].shape[1:]), dtype=dtype)
    start = 0
    for entry in entries:
        part = out[start : start + entry.shape[0]]
        stored = FLOATS.get(entry.dtype)
        if stored is None:
            raise CheckpointError(f"{entry.file}: experts stored as {entry.dtype} cannot be served")
        if stored is dtype:
            reader.fill(part, entry)
        else:
            part.copy_(reader.tensor(entry))
        start += entry.shape[0]
    return out
