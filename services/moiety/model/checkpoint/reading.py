"""Reads a checkpoint's tensors one at a time: as stored, dequantised, or as quantised matrices of `moiety_kernels`.

Reads each tensor's bytes straight into the tensor instead of mapping the file: resident memory stays at the weights'
size. A truncated file gives an error while reading; a mapped file that shrinks would give a SIGBUS later. Imports
torch, never transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import torch

from moiety.errors import CheckpointError
from moiety.model.checkpoint.files import unreadable
from moiety.model.checkpoint.headers import TensorEntry
from moiety.model.checkpoint.quantised import CODES_PER_WORD, FP8_BLOCK, QuantisedEntry, Stored
from moiety_kernels.weights.fp8 import Fp8Matrix
from moiety_kernels.weights.int4 import Int4Matrix
from moiety_kernels.weights.int8 import Int8Matrix
from moiety_kernels.weights.matrix import QuantisedMatrix
from moiety_kernels.weights.mxfp4 import Mxfp4Matrix
from moiety_kernels.weights.nibbles import pack_nibbles, unpack_nibbles

FLOATS: Mapping[str, torch.dtype] = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPES: Mapping[str, torch.dtype] = {
    **FLOATS,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F64": torch.float64,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # the column, of a word's eight, in each nibble of the word, lowest nibble first


class Reader:
    """Reads tensors and keeps their files open until the end of its `with` block."""

    def __init__(self) -> None:
        self._files: dict[Path, BinaryIO] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def fill(self, target: torch.Tensor, entry: TensorEntry) -> None:
        """Reads the bytes of the tensor at `entry` into the contiguous `target`, which has the same number of bytes.

        Raises CheckpointError if the file cannot be read or is truncated.
        """
        if not target.numel():
            return
        view = target.view(-1).view(torch.uint8).numpy().data
        try:
            if entry.file not in self._files:
                self._files[entry.file] = self._stack.enter_context(entry.file.open("rb", buffering=0))
            file = self._files[entry.file]
            file.seek(entry.start)
            while view:  # one read call returns at most 2 GiB
                count = file.readinto(view)  # type: ignore[attr-defined]  # raw files have it
                if not count:
                    raise CheckpointError(f"{entry.file}: truncated: it ends before byte {entry.end}")
                view = view[count:]
        except OSError as error:
            raise CheckpointError(f"{entry.file}: {unreadable(error)}") from error

    def tensor(self, entry: TensorEntry) -> torch.Tensor:
        """Reads the tensor at `entry` in its stored dtype.

        Raises CheckpointError for an unsupported dtype, and in the cases in which `fill` does.
        """
        if entry.dtype not in DTYPES:
            raise CheckpointError(f"{entry.file}: tensors stored as {entry.dtype} are not supported")
        out = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        self.fill(out, entry)
        return out

    def matrix(self, entry: QuantisedEntry) -> QuantisedMatrix:
        """Reads one matrix as its codes hold it and keeps it quantised: the transpose of `entry.shape` if `entry.transposed`.

        Raises CheckpointError if its tensors contradict each other.
        """
        parts = {role: self.tensor(part) for role, part in entry.parts.items()}
        try:
            return _MAKE[entry.method](parts, entry)
        except ValueError as error:
            raise CheckpointError(f"{entry.file}: {error}") from error

    def values(self, entry: Stored, dtype: torch.dtype) -> torch.Tensor:
        """Returns the tensor at `entry` in `dtype` and in the shape of the unquantised tensor; dequantises if needed."""
        if isinstance(entry, TensorEntry):
            return self.tensor(entry).to(dtype)
        if len(entry.shape) == 2:
            values = self.matrix(entry).dequantised(dtype)
            return values.T if entry.transposed else values
        return torch.stack([self.values(_of_expert(entry, expert), dtype) for expert in range(entry.shape[0])])

    def state(self, tensors: Mapping[str, Stored], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Reads all `tensors`: those stored quantised are dequantised to `dtype`, the others keep their stored dtype."""
        return {
            name: self.tensor(entry) if isinstance(entry, TensorEntry) else self.values(entry, dtype)
            for name, entry in tensors.items()
        }


def expert_entry(entry: Stored, expert: int, experts: int) -> Stored:
    """Returns where one expert's part lies in a fused tensor, which holds all experts along dimension 0."""
    return _of_expert(entry, expert) if isinstance(entry, QuantisedEntry) else _expert_part(entry, expert, experts)


def _of_expert(entry: QuantisedEntry, expert: int) -> QuantisedEntry:
    parts = {role: _expert_part(part, expert, entry.shape[0]) for role, part in entry.parts.items()}
    return replace(entry, shape=entry.shape[1:], parts=parts)


def _expert_part(entry: TensorEntry, expert: int, experts: int) -> TensorEntry:
    size = entry.nbytes // experts
    start = entry.start + expert * size
    # [E, ...], or (DBRX) the rows of one expert after the other, [E * rows, ...]
    shape = entry.shape[1:] if entry.shape[0] == experts else (entry.shape[0] // experts, *entry.shape[1:])
    return TensorEntry(entry.file, entry.dtype, shape, start, start + size)


_Parts = Mapping[str, torch.Tensor]


def _fp8(parts: _Parts, _: QuantisedEntry) -> Fp8Matrix:
    return Fp8Matrix(parts["codes"], parts["scale"].float())


def _fp8_by_matrix(parts: _Parts, entry: QuantisedEntry) -> Fp8Matrix:
    blocks = [-(-size // FP8_BLOCK) for size in entry.shape]
    return Fp8Matrix(parts["codes"], parts["scale"].float().reshape(1, 1).repeat(blocks))


def _mxfp4(parts: _Parts, _: QuantisedEntry) -> Mxfp4Matrix:
    codes = parts["codes"]  # [O, D / 32, 16]
    return Mxfp4Matrix(codes.view(codes.shape[0], -1), parts["scale"])


def _gptq(parts: _Parts, entry: QuantisedEntry) -> Int4Matrix:
    codes = _nibbles(parts["codes"].T.contiguous())  # [O, D]
    scale = parts["scale"]
    zero = _nibbles(parts["zero"])  # [G, O]
    if entry.method == "gptq":  # format 1 stores zero points minus one
        zero = (zero + 1) & 15
    order = parts.get("order")
    if order is not None and not torch.equal(order, torch.arange(len(order)) // (codes.shape[1] // len(scale))):
        raise ValueError("its columns are in another order than the groups (g_idx, act-order), which is not supported")
    return _int4(codes, scale, zero)


def _awq(parts: _Parts, _: QuantisedEntry) -> Int4Matrix:
    order = torch.tensor(AWQ_COLUMNS).argsort()

    def unpacked(words: torch.Tensor) -> torch.Tensor:
        nibbles = _nibbles(words)  # [., O] with the columns of each word in AWQ's order
        return nibbles.view(nibbles.shape[0], -1, CODES_PER_WORD)[:, :, order].view(nibbles.shape)

    return _int4(unpacked(parts["codes"]).T, parts["scale"], unpacked(parts["zero"]))


def _int4(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> Int4Matrix:
    """Makes an Int4Matrix of codes [O, D], scales and zero points [G, O]; drops the zero points if all are 8, the default."""
    kept = None if bool((zero == 8).all()) else zero.T.contiguous()
    return Int4Matrix(pack_nibbles(codes), _held_scale(scale.T.contiguous()), kept)


def _packed(parts: _Parts, entry: QuantisedEntry) -> Int4Matrix | Int8Matrix:
    codes, scale = parts["codes"].view(torch.uint8), parts["scale"]  # [O, bytes of a row], [O, G]
    if "order" in parts and tuple(parts["order"].tolist()) != entry.shape:
        raise ValueError(f"weight_shape {parts['order'].tolist()}: rows that end within an int32 are not supported")
    if entry.bits == 8:
        return Int8Matrix(codes, scale.float().view(-1))
    return Int4Matrix(codes, _held_scale(scale))


def _held_scale(scale: torch.Tensor) -> torch.Tensor:
    """Converts float32 scales to float16, at half the bytes. Raises ValueError if that would lose precision."""
    if scale.dtype != torch.float32:
        return scale
    half = scale.half()
    if not torch.equal(half.float(), scale):
        raise ValueError("float32 scales that float16 cannot represent are not supported")
    return half


def _nibbles(words: torch.Tensor) -> torch.Tensor:
    """Unpacks int32 [R, C] to uint8 [R, 8 C], the lowest four bits first."""
    return unpack_nibbles(words.contiguous().view(torch.uint8))  # little-endian: lowest byte first


_MAKE: Mapping[str, Callable[[_Parts, QuantisedEntry], QuantisedMatrix]] = {
    "fp8": _fp8,
    "fp8_by_matrix": _fp8_by_matrix,
    "mxfp4": _mxfp4,
    "gptq": _gptq,
    "gptq_v2": _gptq,
    "awq": _awq,
    "packed": _packed,
}
