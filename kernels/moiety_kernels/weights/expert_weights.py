"""The weights of one expert, one row per output feature; matrices are plain or quantised."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from moiety_kernels.weights.fp8 import Fp8Matrix
from moiety_kernels.weights.int4 import GROUP, Int4Matrix
from moiety_kernels.weights.int8 import Int8Matrix
from moiety_kernels.weights.matrix import Matrix
from moiety_kernels.weights.matrix_ops import to_device
from moiety_kernels.weights.mxfp4 import Mxfp4Matrix

FORMATS = {Int8Matrix: "int8", Int4Matrix: "int4", Fp8Matrix: "fp8", Mxfp4Matrix: "mxfp4"}


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One expert's matrices and biases. O is 2I when gated, else I. Both matrices have the same format.

    Raises ValueError if the shapes do not fit together, a tensor is not contiguous (C++ would read past its end), or the
    two matrices have different types.
    """

    gate_up: Matrix  # [O, D]
    down: Matrix  # [D, I]
    gate_up_bias: torch.Tensor | None = None  # [O]
    down_bias: torch.Tensor | None = None  # [D]
    form: tuple[int, int, int] = field(init=False)  # D, I, O
    weight_format: tuple[Any, ...] = field(init=False)  # experts with equal formats can share a kernel call
    pointers: tuple[int, ...] = field(init=False, repr=False)  # addresses of `parts`; 0 for None

    def __post_init__(self) -> None:
        (width, hidden), inner = self.gate_up.shape, self.down.shape[1]
        shapes = ((width, hidden), (hidden, inner), (width,), (hidden,))
        for name, shape in zip(("gate_up", "down", "gate_up_bias", "down_bias"), shapes, strict=True):
            matrix = getattr(self, name)
            if matrix is None:
                continue
            contiguous = not isinstance(matrix, torch.Tensor) or matrix.is_contiguous()
            if tuple(matrix.shape) != shape or not contiguous:
                found = f"{list(matrix.shape)}{'' if contiguous else ', not contiguous'}"
                raise ValueError(f"expert weights: {name} is {found}: must be {list(shape)}, contiguous")
        if type(self.gate_up) is not type(self.down):
            formats = f"gate_up is {type(self.gate_up).__name__}, down is {type(self.down).__name__}"
            raise ValueError(f"expert weights: {formats}: must be of one format")
        object.__setattr__(self, "form", (hidden, inner, width))
        object.__setattr__(self, "weight_format", (self.kind, *layout_of(self.gate_up), *layout_of(self.down)))
        object.__setattr__(self, "pointers", tuple(0 if part is None else part.data_ptr() for part in self.parts))

    @property
    def kind(self) -> str:
        """The matrices' number format: a dtype such as `bfloat16`, or `int8`, `int4`, `fp8`, `mxfp4`."""
        if isinstance(self.gate_up, torch.Tensor):
            return str(self.gate_up.dtype).removeprefix("torch.")
        return FORMATS[type(self.gate_up)]

    @property
    def parts(self) -> tuple[torch.Tensor | None, ...]:
        """Codes, scale and zero of gate_up, then of down, then both biases; None for those that the format does not have."""
        parts: list[torch.Tensor | None] = []
        for matrix in (self.gate_up, self.down):
            tensors = (matrix,) if isinstance(matrix, torch.Tensor) else matrix.tensors
            parts += (*tensors, None, None)[:3]
        return (*parts, self.gate_up_bias, self.down_bias)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Every tensor of this expert."""
        return tuple(part for part in self.parts if part is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of the storages behind `tensors`; a storage that several of them share counts once for each."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors)

    def to(self, device: torch.device | str) -> ExpertWeights:
        """Returns the same expert on `device`."""
        biases = (None if bias is None else bias.to(device) for bias in (self.gate_up_bias, self.down_bias))
        return ExpertWeights(to_device(self.gate_up, device), to_device(self.down, device), *biases)

    def quantised(self, bits: int = 8, group: int = GROUP, *, rounds_rows: bool = False) -> ExpertWeights:
        """Returns the same expert with matrices of `bits` (8 or 4). Biases and already quantised experts stay as they are.

        8 bits have one scale per output feature, 4 bits have one scale per output feature and `group` columns. For
        normally distributed weights and rows, the error of the output is at most 2 % with 8 bits, 4 % with `rounds_rows`
        (see Int8Matrix), and 20 % with 4 bits: root mean square of the error over that of the unquantised expert's output.
        Rows with outliers lose more. With 4 bits, raises ValueError if `group` is odd or does not divide the columns.
        """
        if not isinstance(self.gate_up, torch.Tensor) or not isinstance(self.down, torch.Tensor):
            return self
        if bits == 8:
            wide = [Int8Matrix.of(matrix, rounds_rows=rounds_rows) for matrix in (self.gate_up, self.down)]
            return replace(self, gate_up=wide[0], down=wide[1])
        scales = torch.bfloat16 if self.gate_up.dtype == torch.bfloat16 else torch.float16
        gate_up, down = (Int4Matrix.of(matrix, group, scales) for matrix in (self.gate_up, self.down))
        return replace(self, gate_up=gate_up, down=down)

    def dequantised(self, dtype: torch.dtype) -> ExpertWeights:
        """Returns the same expert with quantised matrices as values in `dtype`; plain matrices stay as they are."""
        return replace(self, gate_up=dequantised(self.gate_up, dtype), down=dequantised(self.down, dtype))


def layout_of(matrix: Matrix) -> tuple[Any, ...]:
    """Returns what a kernel must know about a matrix besides its kind and shape: a dtype or None, and a number.

    int4: the scales' dtype and the columns per scale. fp8: None and the rows per scale. int8: None and
    `rounds_rows` as 1 or 0. Other matrices: None and 0.
    """
    if isinstance(matrix, Int4Matrix):
        return matrix.scale.dtype, matrix.group
    if isinstance(matrix, Int8Matrix):
        return None, int(matrix.rounds_rows)
    return (None, matrix.block_rows) if isinstance(matrix, Fp8Matrix) else (None, 0)


def dequantised(matrix: Matrix, dtype: torch.dtype) -> torch.Tensor:
    """Returns the values of `matrix` in `dtype`; a plain tensor is returned as it is."""
    return matrix if isinstance(matrix, torch.Tensor) else matrix.dequantised(dtype)
