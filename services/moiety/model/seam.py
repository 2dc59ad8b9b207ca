"""Joins transformers' experts interface to an ExpertBackend: the one place where a model's forward leaves the router.

Which backend a forward uses is a context variable, because transformers hands experts functions no extra arguments, and
because two lanes must be able to run the same model object at the same time, each with its own backend.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import nn

from moiety.core.expert_backend import ExpertBackend

IMPLEMENTATION = "moiety"  # the name under which transformers knows `remote_experts`
LAYER_ATTRIBUTE = "moiety_layer"  # set on each experts module: its MoE layer ordinal
SHARED_EXPERT_ATTRIBUTE = "moiety_overlap"  # set where a shared expert is computed while rows are away: see overlap.py


@dataclass(frozen=True, slots=True)
class PackedRow:
    """How several sequences' tokens [T] lie in the row of one pass, for modules that are told nothing of it."""

    positions: torch.Tensor  # int64 [T], of each token in its sequence
    lengths: tuple[int, ...] | None = None  # of the whole sequences of an encoder's row; a decoder's tokens come alone
    wanted: torch.Tensor | None = None  # int64 [R]: the tokens whose logits are wanted; None: all
    prompts: bool = False  # whether a decoder's layers are handed encoded prompts, of which they keep keys and values


@dataclass(slots=True)
class ForwardContext:
    """What belongs to the passes of one lane."""

    backend: ExpertBackend
    weights: torch.Tensor | None = None  # the layer's routing weights [T, K], for backends that judge what they compute
    shared: tuple[torch.Tensor, torch.Tensor] | None = None  # a shared expert's input, and its output now or later
    row: PackedRow | None = None  # of the pass that is running, where its model is an encoder-decoder
    scores: torch.Tensor | None = None  # [T, E]: what the gate of the layer being computed thinks of each expert


_forward: ContextVar[ForwardContext] = ContextVar("moiety_forward")


@contextmanager
def use_backend(backend: ExpertBackend) -> Iterator[None]:
    """Forwards inside the block, in this thread, send their experts' rows to `backend`."""
    token = _forward.set(ForwardContext(backend))
    try:
        yield
    finally:
        _forward.reset(token)


def current_context() -> ForwardContext:
    """That of the innermost `use_backend`; raises RuntimeError outside of one."""
    try:
        return _forward.get()
    except LookupError:
        raise RuntimeError("a router model was run outside of use_backend(...)") from None


def sequence_lengths() -> tuple[int, ...] | None:
    """The tokens of each sequence of the row that is running, where they are looked at together: in an encoder."""
    row = current_context().row
    return None if row is None else row.lengths


def remote_experts(
    module: nn.Module, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts function: hidden [T, D], top_k_index and top_k_weights [T, K] -> weighted sum over K, [T, D].

    Rows come back unweighted and are combined as transformers' grouped_mm does, to the bit: product in the promoted
    dtype of rows and weights (models differ: float32 or the model's), sum over K in slot order, then the hidden dtype.
    """
    forward, layer = current_context(), int(getattr(module, LAYER_ATTRIBUTE))
    backend, forward.weights = forward.backend, top_k_weights
    pending = backend.submit(layer, hidden, top_k_index)
    if (shared := getattr(module, SHARED_EXPERT_ATTRIBUTE, None)) is not None:
        shared.overlap(forward, hidden)
    rows = pending.result()  # [T, K, D]
    return (rows * top_k_weights.unsqueeze(-1)).sum(dim=1).to(hidden.dtype)


def register() -> None:
    """Makes `remote_experts` selectable as `experts_implementation="moiety"`; harmless when repeated."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, remote_experts)
