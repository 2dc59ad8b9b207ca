"""Computes a block's shared expert while the rows of its routed experts are away, with no code per model.

A block that calls its shared expert behind the routed ones (DeepSeek) finds it computed. One that calls it before them
(Qwen) is given its result as a tensor that is filled in a moment later, while the rows are away; it holds NaN until
then. Which of the two a block is, is learnt by running the model once, and that nothing reads a result too early by
running it again: a model whose logits would change by a bit is left as it was.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moiety.model.seam import LAYER_ATTRIBUTE, SHARED_EXPERT_ATTRIBUTE, ForwardContext, current_context

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Order:
    """What was seen of one block: what its routed and its shared experts were called with, and in which order."""

    routed: torch.Tensor | None = None
    shared: torch.Tensor | None = None
    first: bool = False  # the shared expert comes before the routed ones
    plain: bool = False  # it is called with one tensor, and answers with one of the same shape

    @property
    def usable(self) -> bool:
        """Whether its input is known when rows leave."""
        if self.routed is None or self.shared is None or not self.plain:
            return False
        return self.first or _same(self.routed, self.shared)


class SharedExpert:
    """Stands in for the `forward` of a shared expert. What belongs to one pass lives in that pass's Forward."""

    def __init__(self, module: nn.Module, order: Order):
        self._module, self._compute = module, module.forward
        self._first, self._row = order.first, order.shared is not None and order.shared.dim() == 3
        module.forward = self

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [T, D] or [1, T, D] -> the expert's output for it, of the same shape."""
        forward = current_context()
        if self._first:
            forward.shared = hidden, torch.full_like(hidden, torch.nan)
            return forward.shared[1]
        if forward.shared is not None and _same(forward.shared[0], hidden):
            (_, done), forward.shared = forward.shared, None
            return done.view(hidden.shape)
        return self._forward(hidden)

    def overlap(self, forward: ForwardContext, routed: torch.Tensor) -> None:
        """To be called while the rows of `routed` [T, D] are away."""
        if not self._first:
            hidden = routed[None] if self._row else routed
            forward.shared = hidden, self._forward(hidden)
        elif forward.shared is not None:
            (hidden, later), forward.shared = forward.shared, None
            later.copy_(self._forward(hidden))

    def remove(self) -> None:
        """Leaves the module as it was."""
        self._module.forward = self._compute

    def _forward(self, hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self._compute(hidden)
        return output


def overlap_shared_experts(model: nn.Module, run: Callable[[], torch.Tensor]) -> int:
    """Overlaps every shared expert of a loaded router with its block's hop; returns how many.

    `run` does one forward pass of `model` inside a `use_backend` and returns its logits.
    """
    pairs = list(_pairs(model))
    if not pairs:
        return 0
    with ExitStack() as hooks:
        orders = [_watched(hooks, experts, shared) for experts, shared in pairs]
        expected = run()
    installed: list[tuple[nn.Module, SharedExpert]] = []
    for (experts, shared), order in zip(pairs, orders, strict=True):
        if order.usable:
            installed.append((experts, SharedExpert(shared, order)))
            setattr(experts, SHARED_EXPERT_ATTRIBUTE, installed[-1][1])
    if torch.equal(run(), expected):
        _log.info("%d of %d shared experts are computed while rows are away", len(installed), len(pairs))
        return len(installed)
    for experts, overlapped in installed:
        overlapped.remove()
        delattr(experts, SHARED_EXPERT_ATTRIBUTE)
    _log.warning(
        "shared experts are not overlapped with the hop: the model reads their results before the routed ones'"
    )
    return 0


def _pairs(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """(routed experts, shared expert) of each MoE block that has one of these beside them."""
    for path, module in model.named_modules():
        if hasattr(module, LAYER_ATTRIBUTE):
            block = model.get_submodule(path.rpartition(".")[0])
            shared = [child for name, child in block.named_children() if "shared" in name and "gate" not in name]
            if len(shared) == 1:
                yield module, shared[0]


def _watched(hooks: ExitStack, experts: nn.Module, shared: nn.Module) -> Order:
    """An Order that fills itself in as the block runs."""
    order = Order()

    def on_routed(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        order.routed, order.first = arguments[0], order.shared is not None

    def on_shared(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        order.shared = arguments[0]
        order.plain = len(arguments) == 1 and not options and output.shape == arguments[0].shape

    hooks.callback(experts.register_forward_pre_hook(on_routed).remove)
    hooks.callback(shared.register_forward_hook(on_shared, with_kwargs=True).remove)
    return order


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are the same numbers in the same place, but for leading dimensions of size one."""
    return one.data_ptr() == other.data_ptr() and one.numel() == other.numel() and one.dtype == other.dtype
