"""Describes as data what a transformers experts module computes: its flags, its shapes and, by probing, its activation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from moiety.core.experts import ExpertMLP
from moiety.model.activation import activation_of
from moiety_kernels import ACTIVATIONS, activate

LIMIT_NAMES = ("limit", "swiglu_limit")
ALPHA_NAMES = ("alpha", "swiglu_alpha")


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of an experts module: its name within the module, and its shape.

    The shape is [E, rows, columns], or [E, rows] for a bias; E is the number of experts.
    """

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RoutedExperts:
    """What one module's routed experts compute, and from which parameters.

    `parameters` maps each field of moiety_kernels.ExpertWeights to the parameters that make it up: each expert's parts are
    concatenated along `rows`. Parameters of the fields in `transposed` hold [in, out] instead of [out, in].
    """

    mlp: ExpertMLP
    parameters: Mapping[str, tuple[Parameter, ...]]
    transposed: frozenset[str] = frozenset()

    @property
    def experts(self) -> int:
        return self.parameters["down"][0].shape[0]


def recognise(module: Any) -> RoutedExperts:
    """Describes the experts of `module`, whose class uses transformers' experts interface.

    Raises ValueError if no kernel computes these experts.
    """
    first = "gate_up_proj" if module.has_gate else "up_proj"
    names = {"gate_up": first, "down": "down_proj"}
    if module.has_bias:
        names |= {"gate_up_bias": f"{first}_bias", "down_bias": "down_proj_bias"}
    unknown = {name for name, _ in module.named_parameters()} ^ set(names.values())
    if unknown:
        raise ValueError(f"{type(module).__name__} has parameters unlike {sorted(names.values())}: {sorted(unknown)}")
    if getattr(module, "has_post_expert_norm", False):
        raise ValueError(f"{type(module).__name__} normalises each expert's output, which is not supported")
    shapes = {field: tuple(module.get_parameter(name).shape) for field, name in names.items()}
    rows, columns = shapes["down"][1:]
    hidden, intermediate = (columns, rows) if module.is_transposed else (rows, columns)
    return RoutedExperts(
        _mlp(module, hidden, intermediate),
        {field: (Parameter(name, shapes[field]),) for field, name in names.items()},
        frozenset(field for field, shape in shapes.items() if module.is_transposed and len(shape) == 3),
    )


def _mlp(module: Any, hidden: int, intermediate: int) -> ExpertMLP:
    base = ExpertMLP(
        hidden=hidden, intermediate=intermediate, gated=bool(module.has_gate), biased=bool(module.has_bias)
    )
    try:
        return _probe(module._apply_gate if base.gated else module.act_fn, list(_candidates(module, base)))
    except ValueError as error:
        raise ValueError(f"{type(module).__name__} {error}") from error


def recognise_activation(
    hidden: int,
    intermediate: int,
    activation: Callable[[torch.Tensor], torch.Tensor],
    *,
    gated: bool = True,
    biased: bool = False,
) -> ExpertMLP:
    """Describes an expert down(activation(gate) * up), or down(activation(up)) if it is not `gated`.

    Raises ValueError if no kernel computes its activation.
    """

    def apply(rows: torch.Tensor) -> torch.Tensor:
        gate, up = rows.chunk(2, dim=-1)
        return activation(gate) * up

    base = ExpertMLP(hidden=hidden, intermediate=intermediate, gated=gated, biased=biased)
    candidates = [replace(base, activation=name) for name in ACTIVATIONS if name != "swiglu_clamped"]
    return _probe(apply if gated else activation, candidates)


@torch.no_grad()
def _probe(apply: Callable[[torch.Tensor], torch.Tensor], candidates: list[ExpertMLP]) -> ExpertMLP:
    """Returns the first of `candidates` whose activation gives the same bits as `apply`, in float32 and in bfloat16.

    Raises ValueError if there is no such candidate.
    """
    reach = 4 * max((spec.limit for spec in candidates if spec.limit is not None), default=1.0)
    probe = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)) * reach  # beyond every limit
    for dtype in (torch.float32, torch.bfloat16):
        rows = probe.to(dtype)
        expected = apply(rows)
        candidates = [spec for spec in candidates if torch.equal(activate(rows, activation_of(spec)), expected)]
    if not candidates:
        raise ValueError("applies a gate or an activation that no kernel computes")
    return candidates[0]


def _candidates(module: Any, base: ExpertMLP) -> Iterator[ExpertMLP]:
    """Yields, simplest first, every ExpertMLP that `module` may compute; its attributes give the limits and alphas."""
    limits = [None, *_numbers(module, LIMIT_NAMES)] if base.gated else [None]
    alphas = [None, *_numbers(module, ALPHA_NAMES)]
    for activation in ACTIVATIONS:
        for interleaved in (False, True) if base.gated else (False,):
            for limit in limits:
                for alpha in alphas:
                    if (activation == "swiglu_clamped") == (alpha is not None) and (base.gated or alpha is None):
                        yield replace(base, activation=activation, interleaved=interleaved, limit=limit, alpha=alpha)


def _numbers(module: Any, names: tuple[str, ...]) -> list[float]:
    values = (getattr(module, name, None) for name in names)
    return [float(value) for value in values if isinstance(value, int | float)]
