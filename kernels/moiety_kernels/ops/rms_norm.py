"""RMS normalisation of rows: in one pass of C++ on CPU, else in torch.

Shape legend: D features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from moiety_kernels.cpu.calls import NormCall
from moiety_kernels.cpu.library import load

_NAMES = {torch.float32: "moiety_rms_norm_f32", torch.bfloat16: "moiety_rms_norm_bf16"}


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, *, offset: float = 0.0, late: bool = False
) -> torch.Tensor:
    """Divides each row of x [..., D] by its root mean square and multiplies it by weight [D] + offset; same shape as x.

    x and weight should have one dtype. The root mean square is float32. x divided by it is rounded to x's dtype before
    it is multiplied by the weight. With `late`, only the product is rounded. Models differ in this.
    """
    kernel = rms_norm_kernel(x.dtype) if x.device.type == "cpu" else None
    if kernel is None or weight.dtype != x.dtype:
        normal = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + epsilon)
        if late:
            return (normal * (weight.float() + offset)).to(x.dtype)
        return normal.to(x.dtype) * (weight + offset)
    depth = x.shape[-1]
    rows = x.reshape(-1, depth)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    kernel(
        x=rows.data_ptr(),
        weight=weight.data_ptr(),
        out=out.data_ptr(),
        x_stride=rows.stride(0),
        rows=rows.shape[0],
        depth=depth,
        late=late,
        epsilon=epsilon,
        offset=offset,
    )
    return out.view(x.shape)


def rms_norm_kernel(dtype: torch.dtype) -> Callable[..., None] | None:
    """Returns the C++ function that computes `rms_norm` in `dtype`; None if there is none."""
    if dtype not in _NAMES or (library := load()) is None:
        return None
    return library.function(_NAMES[dtype], NormCall)
