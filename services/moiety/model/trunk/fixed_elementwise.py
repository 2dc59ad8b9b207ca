"""Elementwise functions whose bits do not depend on an element's place in its tensor, for the deterministic setting.

torch computes most of a tensor with vector instructions. What is left at the end of the tensor, or of a thread's part,
it computes one element at a time. In float32 the two ways differ in the last bit of exponentials and similar functions.
Here, tensors are padded to whole vectors and cut into parts too small for two threads, so every element takes the first
way. Sums and products do not need this: both ways round them alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

LANES = 128  # a multiple of the elements in one step of any vector loop: two registers of 32 bfloat16
PART = 32_768 - LANES  # torch splits tensors of at::internal::GRAIN_SIZE elements and more between threads
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
    """While active, each element that a function in `_FUNCTIONS` computes on CPU depends on its input element alone."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Calls `func` part by part if it is in `_FUNCTIONS`, on CPU and not `inplace`; otherwise calls it unchanged."""
        options = kwargs or {}
        if func not in _FUNCTIONS or not args or args[0].device.type != "cpu" or options.get("inplace"):
            return func(*args, **options)
        source: torch.Tensor = args[0]
        flat = functional.pad(source.reshape(-1), (0, -source.numel() % LANES))
        parts = [func(part, *args[1:], **options) for part in flat.split(PART)]
        return torch.cat(parts)[: source.numel()].view(source.shape)


def fix_elementwise(model: nn.Module) -> None:
    """Makes every forward pass of `model` run under FixedElementwise."""
    forward = model.forward

    def fixed(*arguments: Any, **options: Any) -> Any:
        with FixedElementwise():
            return forward(*arguments, **options)

    model.forward = fixed
