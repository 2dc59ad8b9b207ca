"""Reads the weights of selected experts from a checkpoint, and no others. Published quantised weights stay quantised.

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
from moiety.model.checkpoint.reading import FLOATS, Reader, expert_entry
from moiety.model.experts.layout import ExpertLayout
from moiety.model.experts.slicing import slice_of
from moiety_kernels import ExpertWeights, Matrix
from moiety_kernels.weights.expert_weights import dequantised
from moiety_kernels.weights.matrix_ops import concatenate

TRIM_INTERVAL = 32  # experts read between two calls of malloc_trim


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
    """Returns the weights of the experts in `held`, by (MoE layer ordinal, expert), in `dtype` on `device`.

    `held` yields these pairs, and may be an ExpertSet.

    Matrices are [out, in], even if published [in, out]. Matrices published quantised stay quantised; `int8` quantises
    the others, too. With `slices` above 1, `held` numbers slices as `ModelShape.sliced` does: the whole expert is read
    and only the slice is kept; a slice of an expert published quantised holds dequantised values.

    Raises CheckpointError for a pair the model does not have and for a tensor that is missing or cannot be read.
    """
    loaded: dict[tuple[int, int], ExpertWeights] = {}
    with Reader() as reader:
        for count, (layer, number) in enumerate(sorted(held)):
            if count % TRIM_INTERVAL == 0:
                _trim_heap()
            expert, part = divmod(number, slices)
            weights = load_expert(reader, checkpoint, layout, layer, expert, dtype)
            if slices > 1:
                weights = slice_of(weights, layout.shape.mlp, part, slices, dtype)
            weights = weights.to(device)
            loaded[layer, number] = weights.quantised(rounds_rows=True) if int8 else weights
            del weights
    _trim_heap()
    return loaded


def _trim_heap() -> None:
    """Returns freed memory to the system. After dtype conversions, glibc would keep a quarter of the weights' size."""
    with suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


def load_expert(
    reader: Reader,
    checkpoint: Checkpoint,
    layout: ExpertLayout,
    layer: int,
    expert: int,
    dtype: torch.dtype,
) -> ExpertWeights:
    """Reads one expert of MoE layer `layer` as `load_experts` does, but always whole, on CPU and without int8."""
    shape = layout.shape
    if not (0 <= layer < shape.moe_layers and 0 <= expert < shape.experts):
        raise CheckpointError(
            f"checkpoint {checkpoint.path} has no expert {expert} in MoE layer {layer}: "
            f"it has {shape.moe_layers} layers of {shape.experts}"
        )
    read: dict[str, Matrix] = {}
    layer_layout = layout.layers[layer]
    for field, names in layer_layout.sources.items():
        entries = [_entry(checkpoint, layout, name, expert) for name in names]
        read[field] = _read(reader, entries, dtype, transposed=field in layer_layout.transposed)
    gate_up, down = read["gate_up"], read["down"]
    if type(gate_up) is not type(down):  # one kernel computes both, so both need the same format
        gate_up, down = dequantised(gate_up, dtype), dequantised(down, dtype)
    biases = (read.get("gate_up_bias"), read.get("down_bias"))
    return ExpertWeights(gate_up, down, *(None if bias is None else dequantised(bias, dtype) for bias in biases))


def _entry(checkpoint: Checkpoint, layout: ExpertLayout, name: str, expert: int) -> Stored:
    """Returns where one expert's part of the weights `name` is stored: in its own tensor, or in its part of a fused tensor."""
    entry = checkpoint.tensor(name.replace(EXPERT, str(expert)))
    return entry if EXPERT in name else expert_entry(entry, expert, layout.shape.experts)


def _read(reader: Reader, entries: list[Stored], dtype: torch.dtype, *, transposed: bool) -> Matrix:
    """Reads the matrices at `entries`, [out, in] or, if `transposed`, [in, out]; returns them [out, in], joined along `out`.

    The result is quantised if the codes of all matrices are [out, in] and fit together, and in `dtype` otherwise.
    """
    quantised = [entry for entry in entries if isinstance(entry, QuantisedEntry)]
    if len(quantised) == len(entries) and all(entry.transposed == transposed for entry in quantised):
        with suppress(ValueError):  # only some have zero points, or their groups differ: rare enough to dequantise
            return concatenate([reader.matrix(entry) for entry in quantised])
    plain = [entry for entry in entries if isinstance(entry, TensorEntry)]
    if len(plain) == len(entries) and not transposed:
        return _read_plain(reader, plain, dtype)
    matrices = [
        reader.values(entry, dtype) if isinstance(entry, QuantisedEntry) else _read_plain(reader, [entry], dtype)
        for entry in entries
    ]
    return torch.cat([matrix.T if transposed else matrix for matrix in matrices])


def _read_plain(reader: Reader, entries: list[TensorEntry], dtype: torch.dtype) -> torch.Tensor:
    """Reads the tensors at `entries` in `dtype`, concatenated along dim 0; tensors stored in `dtype` are not copied again."""
    rows = sum(entry.shape[0] for entry in entries)
    out = torch.empty((rows, *entries[0].shape[1:]), dtype=dtype)
    start = 0
    for entry in entries:
        part = out[start : start + entry.shape[0]]
        stored = FLOATS.get(entry.dtype)
        if stored is None:
            raise CheckpointError(f"{entry.file}: experts stored as {entry.dtype} are not supported")
        if stored is dtype:
            reader.fill(part, entry)
        else:
            part.copy_(reader.tensor(entry))
        start += entry.shape[0]
    return out
