"""Elementwise functions whose bits do not depend on where in a tensor an element stands, for the deterministic setting.

torch computes most of a tensor with vector instructions, and what is left at the end of it, or of a thread's part of it,
one by one: in float32 the two differ in the last bit of exponentials and the like. Filled up to whole vectors, and in parts
too small to be shared out to threads, every element takes the first way. Sums and products need none of this: both ways
round them alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

LANES = 128  # a multiple of what any vector loop takes at once: two registers of 32 bfloat16
PART = 32_768 - LANES  # at::internal::GRAIN_SIZE elements and more are shared out to threads
_FUNCTIONS = frozenset(
    {
        *(functional.silu, functional.gelu, functional.softplus, functional.mish, functional.elu),
        *(torch._C._nn.silu, torch._C._nn.gelu, torch._C._nn.softplus, torch._C._nn.mish, torch._C._nn.elu),
        *(torch.sigmoid, torch.tanh, torch.exp, torch.cos, torch.sin, torch.erf, torch.log, torch.log1p, torch.expm1),
        *(torch.Tensor.sigmoid, torch.Tensor.tanh, torch.Tensor.exp, torch.Tensor.cos, torch.Tensor.sin),
        *(torch.Tensor.erf, torch.Tensor.log, torch.Tensor.log1p, torch.Tensor.expm1),
    }
)


class FixedElementwise(TorchFunctionMode):
    """While it is on, an element of such a function's result is a function of that element alone, on CPU."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """`func` as it is, or part by part."""
        options = kwargs or {}
        if func not in _FUNCTIONS or not args or args[0].device.type != "cpu" or options.get("inplace"):
            return func(*args, **options)
        source: torch.Tensor = args[0]
        flat = functional.pad(source.reshape(-1), (0, -source.numel() % LANES))
        parts = [func(part, *args[1:], **options) for part in flat.split(PART)]
        return torch.cat(parts)[: source.numel()].view(source.shape)


def fix_elementwise(model: nn.Module) -> None:
    """Runs every pass of `model` under FixedElementwise."""
    forward = model.forward

    def fixed(*arguments: Any, **options: Any) -> Any:
        with FixedElementwise():
            return forward(*arguments, **options)

    model.forward = fixed
