"""Records the gates' scores of every expert in a loaded trunk, so that rows of an overrun expert can go to the next best.

transformers passes only a gate's choice to experts functions. A gate module's own output also holds the scores: the
floating-point tensor with as many columns as there are experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from moiety.core.experts import ModelShape
from moiety.errors import ConfigError
from moiety.model.seam import MOE_LAYER, current_context


def record_gate_scores(model: nn.Module, shape: ModelShape, run: Callable[[], object]) -> None:
    """Makes every gate put its scores into the running lane's ForwardContext before its layer's experts are called.

    `run` does one forward pass of `model` inside a `forward_context`. Raises ConfigError if a gate returns no scores, or does
    not choose the experts with the highest scores (for example, if it chooses by groups): the next best is unknown then.
    """
    agreeing: dict[nn.Module, bool] = {}  # experts module -> whether the chosen experts have the highest scores

    def compare(experts: nn.Module, arguments: tuple[Any, ...]) -> None:
        scores, chosen = current_context().scores, arguments[1]
        best = None if scores is None else scores.topk(chosen.shape[-1], dim=-1).indices
        agreeing[experts] = best is not None and torch.equal(best.sort().values, chosen.sort().values)

    gates = list(_gates(model))
    hooks = [gate.register_forward_hook(_keep(shape.experts)) for _, gate in gates]
    checks = [experts.register_forward_pre_hook(compare) for experts, _ in gates]
    run()
    for check in checks:
        check.remove()
    if len(agreeing) < shape.moe_layers or not all(agreeing.values()):
        for hook in hooks:
            hook.remove()
        reason = f"{shape.architecture}'s gates do not give the next best expert: set overflow to 'wait'"
        raise ConfigError("overflow", "backup", reason)


def _keep(experts: int) -> Callable[[nn.Module, Any, Any], None]:
    """Returns a forward hook that stores a gate's scores [T, E], found among its outputs, in the ForwardContext."""

    def hook(_gate: nn.Module, _arguments: Any, output: Any) -> None:
        tensors = output if isinstance(output, tuple | list) else (output,)
        scores = (
            t for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point() and t.shape[-1] == experts
        )
        found = next(scores, None)
        current_context().scores = None if found is None else found.reshape(-1, experts)

    return hook


def _gates(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yields (routed experts, their gate) for each MoE block with exactly one gate."""
    for path, module in model.named_modules():
        if MOE_LAYER.of(module) is not None:
            block = model.get_submodule(path.rpartition(".")[0])
            gates = [child for name, child in block.named_children() if name in ("gate", "router")]
            if len(gates) == 1:
                yield module, gates[0]
