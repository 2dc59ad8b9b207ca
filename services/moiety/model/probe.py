"""What a transformers experts module computes, as data: its flags, its shapes and, by probing it, its activation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from moiety.core import ExpertMLP
from moiety_kernels import ACTIVATIONS, activate

LIMIT_NAMES = ("limit", "swiglu_limit")
ALPHA_NAMES = ("alpha", "swiglu_alpha")


def parameters_of(module: Any) -> dict[str, str]:
    """Field of ExpertWeights -> the module's parameter. Raises ValueError for parameters no kernel knows."""
    first = "gate_up_proj" if module.has_gate else "up_proj"
    names = {"gate_up": first, "down": "down_proj"}
    if module.has_bias:
        names |= {"gate_up_bias": f"{first}_bias", "down_bias": "down_proj_bias"}
    unknown = {name for name, _ in module.named_parameters()} ^ set(names.values())
    if unknown:
        raise ValueError(f"{type(module).__name__} has parameters unlike {sorted(names.values())}: {sorted(unknown)}")
    return names


def expert_mlp_of(module: Any) -> ExpertMLP:
    """The spec of one expert of `module`, which may be on meta. Raises ValueError where no kernel computes it."""
    names = parameters_of(module)
    if getattr(module, "has_post_expert_norm", False):
        raise ValueError(f"{type(module).__name__} normalises each expert's output, which is not supported")
    down = module.get_parameter(names["down"])  # [E, D, I], transposed [E, I, D]
    hidden, intermediate = (down.shape[2], down.shape[1]) if module.is_transposed else (down.shape[1], down.shape[2])
    blank = ExpertMLP(
        hidden=hidden,
        intermediate=intermediate,
        gated=bool(module.has_gate),
        transposed=bool(module.is_transposed),
        biased=bool(module.has_bias),
    )
    return probed(module, blank, module._apply_gate if blank.gated else module.act_fn)


@torch.no_grad()
def probed(module: Any, blank: ExpertMLP, activation: Callable[[torch.Tensor], torch.Tensor]) -> ExpertMLP:
    """`blank` with the activation whose results equal those of the module's `activation`, in float32 and in bfloat16.

    Bit for bit. Raises ValueError where there is none.
    """
    candidates = list(_candidates(module, blank))
    reach = 4 * max((spec.limit for spec in candidates if spec.limit is not None), default=1.0)
    probe = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)) * reach  # beyond every limit
    for dtype in (torch.float32, torch.bfloat16):
        rows = probe.to(dtype)
        expected = activation(rows)
        candidates = [spec for spec in candidates if torch.equal(_activated(rows, spec), expected)]
    if not candidates:
        raise ValueError(f"{type(module).__name__} applies a gate or an activation that no kernel computes")
    return candidates[0]


def _candidates(module: Any, blank: ExpertMLP) -> Iterator[ExpertMLP]:
    """Every spec that the module's own constants allow, simplest first."""
    limits = [None, *_numbers(module, LIMIT_NAMES)] if blank.gated else [None]
    alphas = [None, *_numbers(module, ALPHA_NAMES)]
    for activation in ACTIVATIONS:
        for interleaved in (False, True) if blank.gated else (False,):
            for limit in limits:
                for alpha in alphas:
                    if (activation == "swiglu_clamped") == (alpha is not None) and (blank.gated or alpha is None):
                        yield replace(blank, activation=activation, interleaved=interleaved, limit=limit, alpha=alpha)


def _activated(rows: torch.Tensor, spec: ExpertMLP) -> torch.Tensor:
    return activate(
        rows,
        activation=spec.activation,
        gated=spec.gated,
        interleaved=spec.interleaved,
        limit=spec.limit,
        alpha=spec.alpha,
    )


def _numbers(module: Any, names: tuple[str, ...]) -> list[float]:
    values = (getattr(module, name, None) for name in names)
    return [float(value) for value in values if isinstance(value, int | float)]
