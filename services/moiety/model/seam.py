"""The seam: what a forward pass reaches outside of its model: the routed experts, and the tokens and cache of a step.

One context variable holds the state of a running forward, because transformers passes no extra arguments to experts
functions, and because two lanes run the same model object at the same time: each lane is a greenlet with its own context.
So nothing that changes from step to step may lie on a module. What a module needs for as long as it is loaded is a ModuleFact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import nn

from moiety.core.expert_backend import ExpertBackend
from moiety.model.batch import Batch, Prompts

IMPLEMENTATION = "moiety"  # transformers' name for `remote_experts`
T = TypeVar("T")


@dataclass(slots=True)
class ForwardContext:
    """The state of one lane's forward pass, and of the layer that it computes now."""

    backend: ExpertBackend
    batch: Batch | None = None  # for the router's attention and state layers; others do without
    weights: torch.Tensor | None = None  # the layer's routing weights [T, K], for backends that act on them
    scores: torch.Tensor | None = None  # [T, E]: the gate's score of each expert, in the layer being computed
    # A shared expert's input, and its output, which is filled now or later.
    shared: tuple[torch.Tensor, torch.Tensor] | None = None
    # While an encoder runs: the token count of each prompt in the row. None in a decoder, which routes each token alone.
    encoding: tuple[int, ...] | None = None
    wanted: torch.Tensor | None = None  # int64 [R]: the tokens whose logits an encoder-decoder computes; None: all


class ModuleFact(Generic[T]):
    """Something that is known about a module for as long as it is loaded. Kept in an attribute of the module."""

    def __init__(self, name: str) -> None:
        self._attribute = f"moiety_{name}"

    def set(self, module: nn.Module, fact: T) -> None:
        setattr(module, self._attribute, fact)

    def of(self, module: nn.Module) -> T | None:
        """Returns the module's fact; None if none was set."""
        fact: T | None = module.__dict__.get(self._attribute)
        return fact

    def remove(self, module: nn.Module) -> None:
        delattr(module, self._attribute)


MOE_LAYER = ModuleFact[int]("layer")  # of an experts module: its MoE layer ordinal
# Of an experts module: computes its block's shared expert during the hop of these rows (`trunk/shared_expert_overlap.py`).
OVERLAP = ModuleFact[Callable[[ForwardContext, torch.Tensor], None]]("overlap")

_forward: ContextVar[ForwardContext] = ContextVar("moiety_forward")


@contextmanager
def forward_context(backend: ExpertBackend, batch: Batch | None = None) -> Iterator[ForwardContext]:
    """Inside the `with` block, this lane's forward sends expert rows to `backend`, and its attention reads `batch`.

    Without a batch, a trunk runs with transformers' own attention only.
    """
    token = _forward.set(context := ForwardContext(backend, batch))
    try:
        yield context
    finally:
        _forward.reset(token)


def current_context() -> ForwardContext:
    """Returns the context of the innermost `forward_context`; raises RuntimeError outside of one."""
    try:
        return _forward.get()
    except LookupError:
        raise _outside() from None


def current_batch() -> Batch:
    """Returns the batch of the running forward; raises RuntimeError outside of a `forward_context` with a batch."""
    batch = current_context().batch
    if batch is None:
        raise _outside()
    return batch


def current_prompts() -> Prompts:
    """Returns the prompts of an encoder-decoder's running forward; raises RuntimeError where `current_batch` does."""
    prompts = current_batch().cross
    assert prompts is not None, "the batch of an encoder-decoder has prompts"
    return prompts


def _outside() -> RuntimeError:
    reason = "a trunk was run outside of forward_context(backend, batch)"
    return RuntimeError(f"{reason}: run its forward inside the block; the router's attention needs a batch")


def remote_experts(
    module: nn.Module, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts function: returns the weighted sum [T, D] of each row's K experts, for hidden [T, D].

    `top_k_index` and `top_k_weights` are [T, K]. The backend returns unweighted rows, which are combined bit for bit as
    in transformers' grouped_mm. Rows and weights are multiplied in their promoted dtype (in some models float32),
    summed over K in slot order, and cast to the dtype of `hidden`.
    """
    forward, layer = current_context(), MOE_LAYER.of(module)
    assert layer is not None, "load_trunk numbers every experts module"
    forward.weights = top_k_weights
    pending = forward.backend.submit(layer, hidden, top_k_index)
    if (overlap := OVERLAP.of(module)) is not None:
        overlap(forward, hidden)
    rows = pending.result()  # [T, K, D]
    return (rows * top_k_weights.unsqueeze(-1)).sum(dim=1).to(hidden.dtype)


def register() -> None:
    """Makes `remote_experts` selectable as `experts_implementation="moiety"`; may be called again."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, remote_experts)
