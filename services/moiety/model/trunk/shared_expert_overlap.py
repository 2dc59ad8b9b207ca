"""Computes a block's shared expert during the hop of its routed experts' rows, without code per model.

A block that calls its shared expert after the routed experts (DeepSeek) gets the result that was computed during the
hop. A block that calls it before them (Qwen) gets a tensor that holds NaN until it is filled in during the hop. One run
of the model shows the order of the calls. A second run checks that no block reads a result too early: if any bit of the
logits changes, all changes to the model are undone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moiety.model.seam import MOE_LAYER, OVERLAP, ForwardContext, current_context

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class BlockCalls:
    """One block's observed calls: the inputs of its routed and its shared experts, and their order."""

    routed: torch.Tensor | None = None
    shared: torch.Tensor | None = None
    first: bool = False  # whether the shared expert is called before the routed ones
    plain: bool = False  # whether the shared expert takes one tensor and returns one of the same shape

    @property
    def usable(self) -> bool:
        """Whether the shared expert's only input is known when the hop starts and has the shape of its output."""
        if self.routed is None or self.shared is None or not self.plain:
            return False
        return self.first or _same(self.routed, self.shared)


class SharedExpert:
    """Stands in for the `forward` of a shared expert. Keeps the state of a pass in that pass's ForwardContext."""

    def __init__(self, module: nn.Module, order: BlockCalls):
        self._module, self._compute = module, module.forward
        self._first, self._row = order.first, order.shared is not None and order.shared.dim() == 3
        module.forward = self

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the shared expert's output for hidden [T, D] or [1, T, D], in the same shape.

        If the block calls it before its routed experts, the output is NaN until `overlap` fills it in.
        """
        forward = current_context()
        if self._first:
            forward.shared = hidden, torch.full_like(hidden, torch.nan)
            return forward.shared[1]
        if forward.shared is not None and _same(forward.shared[0], hidden):
            (_, done), forward.shared = forward.shared, None
            return done.view(hidden.shape)
        return self._forward(hidden)

    def overlap(self, forward: ForwardContext, routed: torch.Tensor) -> None:
        """Computes the shared expert; the seam calls this while the rows `routed` [T, D] are in the hop."""
        if not self._first:
            hidden = routed[None] if self._row else routed
            forward.shared = hidden, self._forward(hidden)
        elif forward.shared is not None:
            (hidden, placeholder), forward.shared = forward.shared, None
            placeholder.copy_(self._forward(hidden))

    def remove(self) -> None:
        """Restores the module's own `forward`."""
        self._module.forward = self._compute

    def _forward(self, hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self._compute(hidden)
        return output


def overlap_shared_experts(model: nn.Module, run: Callable[[], torch.Tensor]) -> int:
    """Overlaps a loaded trunk's shared experts with their blocks' hops where possible; returns how many are overlapped.

    `run` does one forward pass of `model` inside a `forward_context` and returns its logits.
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
            OVERLAP.set(experts, installed[-1][1].overlap)
    if torch.equal(run(), expected):
        _log.info("%d of %d shared experts are computed during the hop", len(installed), len(pairs))
        return len(installed)
    for experts, overlapped in installed:
        overlapped.remove()
        OVERLAP.remove(experts)
    _log.warning(
        "shared experts are not overlapped with the hop: the model reads their results before the routed ones'"
    )
    return 0


def _pairs(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yields (routed experts, shared expert) for each MoE block with exactly one shared expert."""
    for path, module in model.named_modules():
        if MOE_LAYER.of(module) is not None:
            block = model.get_submodule(path.rpartition(".")[0])
            shared = [child for name, child in block.named_children() if "shared" in name and "gate" not in name]
            if len(shared) == 1:
                yield module, shared[0]


def _watched(hooks: ExitStack, experts: nn.Module, shared: nn.Module) -> BlockCalls:
    """Returns a BlockCalls that hooks fill in when the block runs; closing `hooks` removes the hooks."""
    order = BlockCalls()

    def on_routed(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        order.routed, order.first = arguments[0], order.shared is not None

    def on_shared(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        order.shared = arguments[0]
        order.plain = len(arguments) == 1 and not options and output.shape == arguments[0].shape

    hooks.callback(experts.register_forward_pre_hook(on_routed).remove)
    hooks.callback(shared.register_forward_hook(on_shared, with_kwargs=True).remove)
    return order


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same address, element count and dtype; their shapes may differ."""
    return one.data_ptr() == other.data_ptr() and one.numel() == other.numel() and one.dtype == other.dtype
