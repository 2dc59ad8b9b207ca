"""Finds quantised weights in published checkpoints: which stored tensors make up each matrix.

`quantization_config` names the format: fp8 by block (DeepSeek) or by matrix (modelopt, AutoFP8), gpt-oss's mxfp4, GPTQ,
AWQ, or compressed-tensors' pack-quantized. A matrix is listed with the name and shape that it has in an unquantised
checkpoint, so code that looks up a tensor need not know how the tensor is stored. Uses only names, shapes and the
config; `reading.py` reads the bytes.

Legend: X name of a module or parameter, E experts, D input size, O output size, G groups of D that share a scale.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from moiety.errors import CheckpointError
from moiety.model.checkpoint.headers import TensorEntry

FP8_BLOCK = 128
MXFP4_GROUP = 32
CODES_PER_WORD = 8  # four-bit codes in one int32
AWQ_VERSIONS = ("gemm",)


@dataclass(frozen=True, slots=True)
class QuantisedEntry:
    """A matrix, or one matrix per expert, stored as several tensors; `shape` is that of the unquantised tensor.

    `transposed` says that the codes hold the transpose of the unquantised matrix. The format decides: a shape cannot tell
    for a square matrix.
    """

    method: str  # fp8, fp8_by_matrix, mxfp4, gptq, gptq_v2, awq or packed
    shape: tuple[int, ...]
    parts: Mapping[str, TensorEntry]  # by role: codes, scale, zero, order
    bits: int
    transposed: bool = False

    @property
    def dtype(self) -> str:
        """The storage format, for error messages; the counterpart of `TensorEntry.dtype`."""
        return f"{self.method} ({self.bits} bits)"

    @property
    def file(self) -> Path:
        """The file that holds the matrix's quantised codes, for error messages."""
        return self.parts["codes"].file

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())


Stored = TensorEntry | QuantisedEntry
_Tensors = Mapping[str, TensorEntry]
_Method = Callable[[_Tensors, Mapping[str, Any]], Iterator[tuple[str, QuantisedEntry]]]


def stored_tensors(
    path: Path, config: Mapping[str, Any], quantization: Mapping[str, Any], tensors: _Tensors
) -> dict[str, Stored]:
    """Returns where every tensor is stored, by the name that it has in an unquantised checkpoint.

    `quantization` is empty if no tensor is quantised. Raises CheckpointError for an unsupported method or variant.
    """
    if not quantization:
        return dict(tensors)
    method = str(quantization.get("quant_method", "unknown"))
    try:
        if method not in _METHODS:
            raise _UnservedError(f"must be one of {', '.join(_METHODS)}, or unquantised")
        quantised = _found(method, tensors, quantization)
    except _UnservedError as error:
        checkpoint = f"checkpoint {path} (architecture {config.get('model_type', 'unknown')})"
        raise CheckpointError(f"{checkpoint}: its weights are quantised ({method}): {error}") from None
    used = {part for entry in quantised.values() for part in entry.parts.values()}
    plain = {name: entry for name, entry in tensors.items() if entry not in used}
    return {**plain, **quantised}


def _found(method: str, tensors: _Tensors, quantization: Mapping[str, Any]) -> dict[str, QuantisedEntry]:
    """Returns the quantised matrices by name. Raises _UnservedError if config or tensors do not have the method's form."""
    try:
        return dict(_METHODS[method](tensors, quantization))
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, re.error) as error:
        raise _UnservedError(f"quantization_config is not as {method} publishes it: {error}") from error


class _UnservedError(Exception):
    """Quantised weights are stored in a form that is not supported; the message says what is wrong with it."""


def _fp8(tensors: _Tensors, config: Mapping[str, Any]) -> Iterator[tuple[str, QuantisedEntry]]:
    """Finds DeepSeek's fp8 matrices: X.weight in e4m3, X.weight_scale_inv with one factor per 128 x 128 block.

    Without `weight_block_size`, each matrix has one factor, as in AutoFP8's checkpoints.
    """
    block = config.get("weight_block_size")
    if block is None:
        yield from _fp8_by_matrix(tensors)
        return
    if block != [FP8_BLOCK, FP8_BLOCK]:
        raise _UnservedError(f"weight_block_size {block}: must be [{FP8_BLOCK}, {FP8_BLOCK}] or null")
    for name, codes in tensors.items():
        if codes.dtype != "F8_E4M3":
            continue
        scale = _part(tensors, f"{name}_scale_inv", name)
        blocks = tuple(-(-size // FP8_BLOCK) for size in codes.shape[-2:])
        if scale.shape[-2:] != blocks:
            raise _UnservedError(f"{name}_scale_inv is {list(scale.shape)}: must end in {list(blocks)}")
        yield name, QuantisedEntry("fp8", codes.shape, {"codes": codes, "scale": scale}, 8)


def _modelopt(tensors: _Tensors, config: Mapping[str, Any]) -> Iterator[tuple[str, QuantisedEntry]]:
    """Finds modelopt's fp8 matrices: one factor each. Its other algorithms are not supported."""
    if (algorithm := config.get("quant_algo")) != "FP8":
        raise _UnservedError(f"quant_algo {algorithm}: must be FP8")
    yield from _fp8_by_matrix(tensors)


def _fp8_by_matrix(tensors: _Tensors) -> Iterator[tuple[str, QuantisedEntry]]:
    """Finds fp8 matrices with one factor each: X.weight in e4m3, and X.weight_scale or (transformers) X.weight_scale_inv."""
    for name, codes in tensors.items():
        if codes.dtype != "F8_E4M3":
            continue
        published = f"{name}_scale_inv" if f"{name}_scale_inv" in tensors else f"{name}_scale"
        scale = _part(tensors, published, name)
        if len(codes.shape) != 2 or prod(scale.shape) != 1:
            raise _UnservedError(
                f"{name} is {list(codes.shape)}, its scale {list(scale.shape)}: must be [O, D] and one factor"
            )
        yield name, QuantisedEntry("fp8_by_matrix", codes.shape, {"codes": codes, "scale": scale}, 8)


def _mxfp4(tensors: _Tensors, config: Mapping[str, Any]) -> Iterator[tuple[str, QuantisedEntry]]:
    """Finds gpt-oss's mxfp4 parameters X [E, D, O]: X_blocks [E, O, D / 32, 16] and X_scales [E, O, D / 32]."""
    for name, codes in tensors.items():
        if not name.endswith("_blocks"):
            continue
        base = name.removesuffix("_blocks")
        scale = _part(tensors, f"{base}_scales", name)
        if len(codes.shape) != 4 or codes.shape[3] != MXFP4_GROUP // 2 or scale.shape != codes.shape[:3]:
            raise _UnservedError(
                f"{name} is {list(codes.shape)}, its scales {list(scale.shape)}: must be [E, O, G, 16]"
            )
        experts, rows, groups, _ = codes.shape
        shape = (experts, groups * MXFP4_GROUP, rows)
        yield base, QuantisedEntry("mxfp4", shape, {"codes": codes, "scale": scale}, 4, transposed=True)


def _gptq(tensors: _Tensors, config: Mapping[str, Any]) -> Iterator[tuple[str, QuantisedEntry]]:
    """Finds GPTQ matrices, format 1 or 2: X.qweight [D / 8, O], X.qzeros [G, O / 8], X.scales [G, O], optional X.g_idx [D]."""
    _only_four_bits(config)
    if config.get("desc_act"):
        raise _UnservedError("desc_act (act-order: columns in another order than the groups) is not supported")
    if (method := config.get("checkpoint_format", "gptq")) not in ("gptq", "gptq_v2"):
        raise _UnservedError(f"checkpoint_format {method}: must be gptq or gptq_v2")
    for name, codes, parts in _packed_words(tensors):
        if f"{name}.g_idx" in tensors:
            parts["order"] = tensors[f"{name}.g_idx"]
        shape = (codes.shape[1], codes.shape[0] * CODES_PER_WORD)
        yield f"{name}.weight", QuantisedEntry(method, shape, parts, 4)


def _awq(tensors: _Tensors, config: Mapping[str, Any]) -> Iterator[tuple[str, QuantisedEntry]]:
    """Finds AWQ matrices: X.qweight [D, O / 8] and X.qzeros [G, O / 8] with interleaved columns, and X.scales [G, O]."""
    _only_four_bits(config)
    if (version := str(config.get("version", "gemm")).lower()) not in AWQ_VERSIONS:
        raise _UnservedError(f"version {version}: must be {', '.join(AWQ_VERSIONS)}")
    for name, codes, parts in _packed_words(tensors):
        shape = (codes.shape[1] * CODES_PER_WORD, codes.shape[0])
        yield f"{name}.weight", QuantisedEntry("awq", shape, parts, 4)


def _packed_words(tensors: _Tensors) -> Iterator[tuple[str, TensorEntry, dict[str, TensorEntry]]]:
    """Yields, for each module X that has X.qweight: X, X.qweight, and the tensors of X by role (codes, scale, zero)."""
    for tensor, codes in tensors.items():
        if not tensor.endswith(".qweight"):
            continue
        name = tensor.removesuffix(".qweight")
        scale, zero = _part(tensors, f"{name}.scales", tensor), _part(tensors, f"{name}.qzeros", tensor)
        yield name, codes, {"codes": codes, "scale": scale, "zero": zero}


def _compressed(tensors: _Tensors, config: Mapping[str, Any]) -> Iterator[tuple[str, QuantisedEntry]]:
    """Finds compressed-tensors' pack-quantized matrices: X.weight_packed [O, D * bits / 32], X.weight_scale [O, G]."""
    if (form := config.get("format")) != "pack-quantized":
        raise _UnservedError(f"format {form}: must be pack-quantized")
    groups = [(_targets(group), _weights_of(group)) for group in config.get("config_groups", {}).values()]
    for tensor, codes in tensors.items():
        if not tensor.endswith(".weight_packed"):
            continue
        name = tensor.removesuffix(".weight_packed")
        scale = _part(tensors, f"{name}.weight_scale", tensor)
        if f"{name}.weight_g_idx" in tensors:
            raise _UnservedError(f"{name} has columns in another order (weight_g_idx), which is not supported")
        bits = next((bits for targets, bits in groups if targets.match(name)), None)
        if bits is None:
            raise _UnservedError(f"no config group targets {name}")
        shape = (codes.shape[0], codes.shape[1] * 32 // bits)
        if bits == 8 and scale.shape[1] != 1:
            raise _UnservedError(f"{name} has 8 bits and {scale.shape[1]} groups a row: must be 1 with 8 bits")
        parts = {"codes": codes, "scale": scale}
        if f"{name}.weight_shape" in tensors:
            parts["order"] = tensors[f"{name}.weight_shape"]
        yield f"{name}.weight", QuantisedEntry("packed", shape, parts, bits)


def _weights_of(group: Mapping[str, Any]) -> int:
    """Returns the bits per weight of a compressed-tensors config group; raises _UnservedError for unsupported schemes."""
    weights = group.get("weights") or {}
    supported = {"type": ("int",), "symmetric": (True,), "num_bits": (4, 8), "strategy": ("group", "channel")}
    for name, values in supported.items():
        if (value := weights.get(name)) not in values:
            raise _UnservedError(f"weights.{name} {value}: must be {' or '.join(map(str, values))}")
    if group.get("input_activations"):
        raise _UnservedError("input_activations are quantised: only quantised weights are supported")
    return int(weights["num_bits"])


def _targets(group: Mapping[str, Any]) -> re.Pattern[str]:
    """Returns one pattern that matches the names of all modules that a compressed-tensors config group targets.

    A target is the class `Linear` (every module), a module's name, or a regular expression after `re:`. All targets are
    joined into one pattern because a large model has tens of thousands of modules and hundreds of targets.
    """
    parts = [
        target[3:] if target.startswith("re:") else ".*" if target == "Linear" else f"{re.escape(target)}$"
        for target in group.get("targets", ())
    ]
    return re.compile("|".join(f"(?:{part})" for part in parts) or "(?!)")


def _only_four_bits(config: Mapping[str, Any]) -> None:
    if (bits := config.get("bits")) != 4:
        raise _UnservedError(f"bits {bits}: must be 4")


def _part(tensors: _Tensors, name: str, owner: str) -> TensorEntry:
    """Returns the tensor `name`, which the tensor `owner` needs (codes need scales). Raises _UnservedError if it is missing."""
    if name not in tensors:
        raise _UnservedError(f"tensor {name}, which belongs to {owner}, is missing")
    return tensors[name]


_METHODS: Mapping[str, _Method] = {
    "fp8": _fp8,
    "modelopt": _modelopt,
    "mxfp4": _mxfp4,
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
}
