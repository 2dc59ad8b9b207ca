"""The activation between an expert's two products: a value that says which one, and its definition in plain torch.

Shape legend: R rows, I intermediate size, O = 2I when gated, else I.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional

SWIGLU_CLAMPED = "swiglu_clamped"  # gpt-oss: includes the gating, so it has no one-argument form

_ELEMENTWISE: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda x: torch.square(functional.relu(x)),
}
ACTIVATIONS: tuple[str, ...] = (*_ELEMENTWISE, SWIGLU_CLAMPED)  # C++ numbers them in this order


@dataclass(frozen=True, slots=True)
class Activation:
    """What an expert applies to its first product. Gated experts multiply the activated gate by up.

    `swiglu_clamped` is `(up + 1) * gate * sigmoid(alpha * gate)`. Raises ValueError if the name is not in ACTIVATIONS, if
    `alpha` is given for another activation than `swiglu_clamped` or is missing for that one, or if an expert without a gate
    is to be clamped or interleaved.
    """

    name: str = "silu"
    gated: bool = True
    interleaved: bool = False  # gate and up are alternating columns of the first product, instead of its halves
    limit: float | None = None  # clamps gate to at most `limit`, and up to [-`limit`, `limit`]
    alpha: float | None = None

    def __post_init__(self) -> None:
        if self.name not in ACTIVATIONS:
            raise ValueError(f"activation {self.name!r}: must be one of {', '.join(ACTIVATIONS)}")
        if (self.alpha is not None) != (self.name == SWIGLU_CLAMPED):
            needed = "a number" if self.name == SWIGLU_CLAMPED else "None"
            raise ValueError(f"alpha {self.alpha}: must be {needed} for the activation {self.name!r}")
        if not self.gated and (self.interleaved or self.limit is not None or self.name == SWIGLU_CLAMPED):
            raise ValueError(f"gated {self.gated}: must be True for {self}")


SWIGLU = Activation()


def activate(projected: torch.Tensor, activation: Activation = SWIGLU) -> torch.Tensor:
    """Applies `activation` to the first product `projected` [R, O]; returns the input of the second product [R, I]."""
    if not activation.gated:
        return _ELEMENTWISE[activation.name](projected)
    if activation.interleaved:
        gate, up = projected[..., ::2], projected[..., 1::2]  # [R, I] each
    else:
        gate, up = projected.chunk(2, dim=-1)
    if (limit := activation.limit) is not None:
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    if activation.alpha is not None:
        return (up + 1) * (gate * torch.sigmoid(gate * activation.alpha))
    return _ELEMENTWISE[activation.name](gate) * up
