"""The published formulas of quantised weights in numpy and float64, written from the formats' descriptions.

Tests compare the weights that Moiety reads with these. Nothing here uses the code under test.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def dequantised_copy(source: Path, target: Path) -> Path:
    """Writes the checkpoint `source` as plain float32 in one file, with the names of an unquantised one."""
    target.mkdir()
    for file in source.iterdir():
        if "safetensors" not in file.name and file.name != "config.json":
            (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text())
    method = config.pop("quantization_config")["quant_method"]
    (target / "config.json").write_text(json.dumps(config))
    stored = {name: tensor for file in source.glob("*.safetensors") for name, tensor in load_file(file).items()}
    values = METHODS[method](stored)
    tensors = {name: torch.from_numpy(np.ascontiguousarray(value)).float() for name, value in values.items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


Stored = dict[str, torch.Tensor]
Values = dict[str, np.ndarray]


def plain(stored: Stored, *endings: str) -> Values:
    """Returns the tensors that are stored unquantised."""
    return {name: tensor.double().numpy() for name, tensor in stored.items() if not name.endswith(endings)}


def fp8(stored: Stored) -> Values:
    """Code times the factor of its 128 x 128 block."""
    values = plain(stored, "_scale_inv")
    for name in list(values):
        if (scale := stored.get(f"{name}_scale_inv")) is not None:
            rows, columns = np.indices(values[name].shape)
            values[name] = values[name] * scale.double().numpy()[rows // 128, columns // 128]
    return values


def fp8_by_matrix(stored: Stored) -> Values:
    """Code times the factor of its matrix. The other scales are for activations and for a KV cache in fp8."""
    values = plain(stored, "_scale")
    return {
        name: value * stored.get(f"{name}_scale", torch.ones(())).double().numpy() for name, value in values.items()
    }


def mxfp4(stored: Stored) -> Values:
    """Two e2m1 codes a byte, low half first, times 2 ** (exponent - 127); blocks are [E, O, G, 16], the parameter [E, D, O]."""
    values = plain(stored, "_blocks", "_scales")
    for name in [name for name in stored if name.endswith("_blocks")]:
        base = name.removesuffix("_blocks")
        blocks, exponents = stored[name].numpy(), stored[f"{base}_scales"].numpy().astype(int)
        pairs = np.stack([E2M1[blocks & 15], E2M1[blocks >> 4]], axis=-1)  # [E, O, G, 16, 2]
        scaled = pairs.reshape(*blocks.shape[:3], 32) * 2.0 ** (exponents[..., None] - 127)
        values[base] = scaled.reshape(*blocks.shape[:2], -1).transpose(0, 2, 1)
    return values


def nibbles(words: np.ndarray) -> np.ndarray:
    """Unpacks [R, C] int32 to [R, C, 8], lowest nibble first."""
    return words.view(np.uint32)[:, :, None] >> (4 * np.arange(8, dtype=np.uint32)) & 15


def gptq(stored: Stored) -> Values:
    """(code - (zero + 1)) * scale[g_idx]: codes packed down the rows, zero points along them."""
    values = plain(stored, ".qweight", ".qzeros", ".scales", ".g_idx")
    for name in [name for name in stored if name.endswith(".qweight")]:
        base = name.removesuffix(".qweight")
        codes = nibbles(stored[name].numpy()).transpose(0, 2, 1)  # [D / 8, 8, O]
        codes = codes.reshape(-1, codes.shape[2]).astype(int)
        zeros = nibbles(stored[f"{base}.qzeros"].numpy()).reshape(len(stored[f"{base}.scales"]), -1).astype(int) + 1
        group = stored[f"{base}.g_idx"].numpy()
        scales = stored[f"{base}.scales"].double().numpy()
        values[f"{base}.weight"] = ((codes - zeros[group]) * scales[group]).T
    return values


def awq(stored: Stored) -> Values:
    """(code - zero) * scale: nibble i of a word is its column AWQ_ORDER[i]."""
    values = plain(stored, ".qweight", ".qzeros", ".scales")
    for name in [name for name in stored if name.endswith(".qweight")]:
        base = name.removesuffix(".qweight")
        codes, zeros = (ordered(nibbles(stored[f"{base}.{part}"].numpy())) for part in ("qweight", "qzeros"))
        scales = stored[f"{base}.scales"].double().numpy()
        size = len(codes) // len(scales)
        values[f"{base}.weight"] = ((codes - zeros.repeat(size, axis=0)) * scales.repeat(size, axis=0)).T
    return values


def ordered(words: np.ndarray) -> np.ndarray:
    """Reorders [R, C, 8] in AWQ's order to [R, 8 C]."""
    columns = np.empty_like(words, dtype=int)
    for nibble, column in enumerate(AWQ_ORDER):
        columns[:, :, column] = words[:, :, nibble]
    return columns.reshape(len(words), -1)


def compressed(stored: Stored) -> Values:
    """(code - 2 ** (bits - 1)) * scale of the group: codes packed along the rows, the first in the lowest bits."""
    values = plain(stored, ".weight_packed", ".weight_scale", ".weight_shape")
    for name in [name for name in stored if name.endswith(".weight_packed")]:
        base = name.removesuffix(".weight_packed")
        shape = stored[f"{base}.weight_shape"].tolist()
        words = stored[name].numpy().view(np.uint32)
        bits = 32 * words.shape[1] // shape[1]
        shifts = np.arange(32 // bits, dtype=np.uint32) * bits
        codes = (words[:, :, None] >> shifts & (2**bits - 1)).reshape(shape).astype(int)
        scales = stored[f"{base}.weight_scale"].double().numpy()
        size = shape[1] // scales.shape[1]
        values[f"{base}.weight"] = (codes - 2 ** (bits - 1)) * scales.repeat(size, axis=1)
    return values


METHODS = {
    "fp8": fp8,
    "modelopt": fp8_by_matrix,
    "mxfp4": mxfp4,
    "gptq": gptq,
    "awq": awq,
    "compressed-tensors": compressed,
}
