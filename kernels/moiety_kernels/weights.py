"""The weights of one expert, one row per output feature, as they are or quantised to int8."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

ZERO_POINT = 128  # added to int8 weights, which are kept as uint8: x86 multiplies unsigned by signed bytes
LARGEST = 127
_TENSORS = ("gate_up", "down", "gate_up_bias", "down_bias", "gate_up_scale", "down_scale")


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One expert's tensors; O is 2I when gated, else I. With scales, the matrices are int8 (`quantised`).

    Raises ValueError where one of them is of another shape, or not contiguous: C++ would read what lies behind it.
    """

    gate_up: torch.Tensor  # [O, D]
    down: torch.Tensor  # [D, I]
    gate_up_bias: torch.Tensor | None = None  # [O]
    down_bias: torch.Tensor | None = None  # [D]
    gate_up_scale: torch.Tensor | None = None  # [O], float32
    down_scale: torch.Tensor | None = None  # [D], float32
    form: tuple[int, int, int, torch.dtype] = field(init=False)  # D, I, O and dtype of the matrices

    def __post_init__(self) -> None:
        (width, hidden), inner = self.gate_up.shape, self.down.shape[1]
        shapes = ((width, hidden), (hidden, inner), (width,), (hidden,), (width,), (hidden,))
        for name, tensor, shape in zip(_TENSORS, self.tensors, shapes, strict=True):
            if tensor is not None and (tensor.shape != shape or not tensor.is_contiguous()):
                told = f"{list(tensor.shape)}{'' if tensor.is_contiguous() else ', not contiguous'}"
                raise ValueError(f"expert weights: {name} is {told}: must be {list(shape)}, contiguous")
        object.__setattr__(self, "form", (hidden, inner, width, self.gate_up.dtype))

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """All six, in the order of the fields."""
        return (self.gate_up, self.down, self.gate_up_bias, self.down_bias, self.gate_up_scale, self.down_scale)

    @property
    def nbytes(self) -> int:
        """Bytes of storage that these weights keep alive."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors if tensor is not None)

    def to(self, device: torch.device | str) -> ExpertWeights:
        """The same weights on `device`; themselves where they are there."""
        moved = {
            name: tensor.to(device) for name, tensor in zip(_TENSORS, self.tensors, strict=True) if tensor is not None
        }
        return ExpertWeights(**moved)

    def quantised(self) -> ExpertWeights:
        """The same expert with int8 matrices; biases stay as they are.

        Symmetric, one scale per output feature, rounded to the nearest. With rows quantised likewise, each by its own
        largest magnitude, an expert's output is within 4 % of the unquantised one's (root mean square over root mean
        square) where weights and rows are spread like noise; a row with outliers loses more.
        """
        gate_up, gate_up_scale = _quantised(self.gate_up)
        down, down_scale = _quantised(self.down)
        return replace(self, gate_up=gate_up, down=down, gate_up_scale=gate_up_scale, down_scale=down_scale)

    def dequantised(self, dtype: torch.dtype) -> ExpertWeights:
        """The inverse, up to rounding; weights that are not quantised stay as they are."""
        if self.gate_up_scale is None or self.down_scale is None:
            return self
        return ExpertWeights(
            _dequantised(self.gate_up, self.gate_up_scale).to(dtype),
            _dequantised(self.down, self.down_scale).to(dtype),
            self.gate_up_bias,
            self.down_bias,
        )


def _quantised(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[O, D] -> uint8 [O, D], scales [O]. A row of zeros has the scale 0."""
    scale = matrix.abs().amax(dim=1).float() / LARGEST
    steps = (matrix.float() / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round_()
    return steps.add_(ZERO_POINT).to(torch.uint8), scale


def _dequantised(steps: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (steps.float() - ZERO_POINT) * scale[:, None]
