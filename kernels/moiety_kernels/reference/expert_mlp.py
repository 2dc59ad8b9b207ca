"""One expert's MLP in plain torch: the definition against which every faster kernel is tested.

Operations, their order and their dtypes follow transformers' `integrations/moe.py`: a bias is added to the rounded product,
and activations run in the rows' dtype. So results equal transformers' bit for bit if the matrix products do.

Shape legend: R rows, D hidden size, I intermediate size, O = 2I when gated, else I.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.nn import functional

from moiety_kernels.weights.expert_weights import ExpertWeights, dequantised

SWIGLU_CLAMPED = "swiglu_clamped"  # gpt-oss: includes the gating, so it has no one-argument form

_ELEMENTWISE: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda x: torch.square(functional.relu(x)),
}
ACTIVATIONS: tuple[str, ...] = (*_ELEMENTWISE, SWIGLU_CLAMPED)


def activate(
    projected: torch.Tensor,
    *,
    activation: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    limit: float | None = None,
    alpha: float | None = None,
) -> torch.Tensor:
    """Applies the activation to the first projection `projected` [R, O]; returns the input of the second [R, I].

    Gated experts have gate and up side by side, or in alternating columns when `interleaved`. `limit` clamps gate to at
    most `limit`, and up to [-`limit`, `limit`]. `swiglu_clamped` is `(up + 1) * gate * sigmoid(alpha * gate)`. Raises
    ValueError if `activation` is not in ACTIVATIONS, or is `swiglu_clamped` and `gated` is false or `alpha` is None.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r}: must be one of {', '.join(ACTIVATIONS)}")
    if not gated and activation != SWIGLU_CLAMPED:
        return _ELEMENTWISE[activation](projected)
    if interleaved:
        gate, up = projected[..., ::2], projected[..., 1::2]  # [R, I] each
    else:
        gate, up = projected.chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    if activation == SWIGLU_CLAMPED:
        if not gated or alpha is None:
            raise ValueError(f"activation {SWIGLU_CLAMPED!r} needs a gated expert and alpha")
        return (up + 1) * (gate * torch.sigmoid(gate * alpha))
    return _ELEMENTWISE[activation](gate) * up


def expert_mlp(
    rows: torch.Tensor,
    weights: ExpertWeights,
    *,
    activation: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    limit: float | None = None,
    alpha: float | None = None,
) -> torch.Tensor:
    """Runs `rows` [R, D] through one expert; returns [R, D] in the rows' dtype. Plain weights must have this dtype."""
    projected = rows @ dequantised(weights.gate_up, rows.dtype).T  # [R, O]
    if weights.gate_up_bias is not None:
        projected = projected + weights.gate_up_bias
    # [R, I]
    inner = activate(projected, activation=activation, gated=gated, interleaved=interleaved, limit=limit, alpha=alpha)
    out = inner @ dequantised(weights.down, rows.dtype).T  # [R, D]
    return out if weights.down_bias is None else out + weights.down_bias
