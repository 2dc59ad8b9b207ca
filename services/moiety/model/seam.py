"""The seam: connects transformers' experts interface to an ExpertBackend. Only here does a model's forward leave the router.

A context variable holds the backend of a forward, because transformers passes no extra arguments to experts functions, and
because two lanes run the same model object at the same time, each with its own backend.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import nn

from moiety.core.expert_backend import ExpertBackend

IMPLEMENTATION = "moiety"  # transformers' name for `remote_experts`
LAYER_ATTRIBUTE = "moiety_layer"  # set on each experts module: its MoE layer ordinal
# Set on experts modules whose block computes its shared expert during the hop: see `trunk/shared_expert_overlap.py`.
SHARED_EXPERT_ATTRIBUTE = "moiety_overlap"


@dataclass(frozen=True, slots=True)
class PackedRow:
    """How the T tokens of one forward pass divide into sequences, for modules that do not get this as an argument."""

    positions: torch.Tensor  # int64 [T], each token's position in its sequence
    lengths: tuple[int, ...] | None = None  # in an encoder: the token count of each prompt; None in a decoder
    wanted: torch.Tensor | None = None  # int64 [R]: the tokens whose logits are computed; None: all
    prompts: bool = False  # whether the decoder's layers get encoded prompts, whose keys and values they cache


@dataclass(slots=True)
class ForwardContext:
    """The backend of one lane's forward passes, and the state of the running pass and of its current layer."""

    backend: ExpertBackend
    weights: torch.Tensor | None = None  # the layer's routing weights [T, K], for backends that act on them
    shared: tuple[torch.Tensor, torch.Tensor] | None = (
        None  # a shared expert's input, and its output, filled now or later
    )
    row: PackedRow | None = None  # the running pass's tokens, if the model is an encoder-decoder
    scores: torch.Tensor | None = None  # [T, E]: the gate's score of each expert, in the layer being computed


_forward: ContextVar[ForwardContext] = ContextVar("moiety_forward")


@contextmanager
def use_backend(backend: ExpertBackend) -> Iterator[None]:
    """Sends the expert rows of this thread's forwards to `backend`, inside the `with` block."""
    token = _forward.set(ForwardContext(backend))
    try:
        yield
    finally:
        _forward.reset(token)


def current_context() -> ForwardContext:
    """Returns the context of the innermost `use_backend`; raises RuntimeError outside of one."""
    try:
        return _forward.get()
    except LookupError:
        raise RuntimeError("a trunk was run outside of use_backend(...): run its forward inside the block") from None


def sequence_lengths() -> tuple[int, ...] | None:
    """Returns the token count of each prompt in the running encoder pass; None in a decoder, which routes each token alone."""
    row = current_context().row
    return None if row is None else row.lengths


def remote_experts(
    module: nn.Module, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts function: returns the weighted sum [T, D] of each row's K experts, for hidden [T, D].

    `top_k_index` and `top_k_weights` are [T, K]. The backend returns unweighted rows, which are combined bit for bit as
    in transformers' grouped_mm. Rows and weights are multiplied in their promoted dtype (in some models float32),
    summed over K in slot order, and cast to the dtype of `hidden`.
    """
    forward, layer = current_context(), int(getattr(module, LAYER_ATTRIBUTE))
    backend, forward.weights = forward.backend, top_k_weights
    pending = backend.submit(layer, hidden, top_k_index)
    if (shared := getattr(module, SHARED_EXPERT_ATTRIBUTE, None)) is not None:
        shared.overlap(forward, hidden)
    rows = pending.result()  # [T, K, D]
    return (rows * top_k_weights.unsqueeze(-1)).sum(dim=1).to(hidden.dtype)


def register() -> None:
    """Makes `remote_experts` selectable as `experts_implementation="moiety"`; may be called again."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, remote_experts)
