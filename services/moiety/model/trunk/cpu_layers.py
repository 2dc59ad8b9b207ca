"""Runs a trunk's linear layers and RMS norms on CPU through `moiety_kernels`, without code per model.

Replaces linear layers' weights, not modules: many gates call `functional.linear` directly, and a weight intercepts this
call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from moiety_kernels.ops.linear import linear, linear_kernel
from moiety_kernels.ops.rms_norm import rms_norm, rms_norm_kernel

DTYPES = (torch.float32, torch.bfloat16)
_CONVERSIONS = frozenset({torch.Tensor.to, torch.Tensor.type, torch.Tensor.float})
# Variants of the norm in models: (offset added to the weight, `late`: whether the weight is multiplied before rounding).
_NORMS = ((0.0, False), (0.0, True), (1.0, False), (1.0, True))


class LinearWeight(nn.Parameter):
    """A weight [O, D] that makes `functional.linear` use moiety_kernels; all other functions treat it as a plain tensor."""

    deterministic: bool

    @classmethod
    def of(cls, data: torch.Tensor, deterministic: bool) -> LinearWeight:
        """Makes a weight that shares its storage with `data`."""
        weight = torch.Tensor._make_subclass(cls, data, False)
        weight.deterministic = deterministic
        return weight

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is functional.linear:
                return _linear(*args, **(kwargs or {}))
            result = func(*args, **(kwargs or {}))
            if func in _CONVERSIONS and isinstance(args[0], cls):  # some gates convert their weight to float32
                return cls.of(result, args[0].deterministic)
            return result


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Stands in for functional.linear, with the same parameter names."""
    if not isinstance(weight, LinearWeight) or input.dtype != weight.dtype or input.device != weight.device:
        return functional.linear(input, weight, bias)
    rows = linear(input.reshape(-1, input.shape[-1]), weight, bias, deterministic=weight.deterministic)
    return rows.view(*input.shape[:-1], weight.shape[0])


def use_cpu_kernels(model: nn.Module, *, deterministic: bool = False) -> nn.Module:
    """Makes linear layers and RMS norms on CPU use moiety_kernels where these have a kernel for the layer's dtype.

    With `deterministic`, a linear layer's output row depends bit for bit on its input row alone, also without a kernel.
    Returns the model.
    """
    for module in model.modules():
        if not isinstance(module, nn.Embedding):
            _replace_weights(module, deterministic)
        if type(module).__name__.endswith("RMSNorm"):
            _replace_norm(module)
    return model


def _replace_weights(module: nn.Module, deterministic: bool) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        usable = parameter.device.type == "cpu" and parameter.dim() == 2 and parameter.dtype in DTYPES
        if usable and (deterministic or linear_kernel(parameter.dtype) is not None):
            module.register_parameter(name, LinearWeight.of(parameter.data, deterministic))


def _replace_norm(module: nn.Module) -> None:
    """Replaces an RMS norm's forward by the kernel variant that gives the same results on random rows, if there is one."""
    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, torch.Tensor) or weight.dim() != 1 or epsilon is None:
        return
    if weight.device.type != "cpu" or rms_norm_kernel(weight.dtype) is None:
        return
    probe = torch.randn(4, weight.shape[0], generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    with torch.no_grad():
        expected = module(probe)
        for offset, late in _NORMS:

            def forward(x: torch.Tensor, offset: float = offset, late: bool = late) -> torch.Tensor:
                return rms_norm(x, weight, epsilon, offset=offset, late=late)

            if _same(forward(probe), expected):
                module.forward = forward
                return


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two results are equal up to the order of sums.

    In bfloat16 one value in 50 may differ; a wrong formula changes one in four.
    """
    if found.dtype != expected.dtype:
        return False
    if found.dtype == torch.float32:
        return torch.allclose(found, expected, rtol=1e-6, atol=1e-6)
    return bool((found == expected).float().mean() > 0.98) and torch.allclose(found, expected, rtol=1e-2, atol=1e-6)
