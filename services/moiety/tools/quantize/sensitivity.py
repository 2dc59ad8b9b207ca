"""What each expert's weights are worth: the error of a model's outputs when an expert is stored in fewer bits.

One forward of the router's model over calibration text; at each MoE layer its experts are read, one at a time, computed as
they are (which the forward goes on with) and in every smaller precision. So memory holds the router and one expert.

Legend: T tokens, K experts per token, D hidden size, n rows of one expert.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from moiety.core.expert_backend import PendingRows
from moiety.core.experts import ExpertMLP
from moiety.errors import CheckpointError
from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.checkpoint.reading import Reader
from moiety.model.experts.layout import ExpertLayout
from moiety.model.experts.read import load_expert
from moiety.model.seam import current_context, use_backend
from moiety.model.trunk.read import load_trunk
from moiety.policy.precision import Precision
from moiety_kernels import ExpertWeights, grouped_expert_mlp

ROWS = 512  # of an expert that its error is measured on; more are counted, and taken to err alike
UNUSED = 0.5  # uses that an expert is credited with which no token of the calibration text chose

Pair = tuple[int, int]  # MoE layer, expert


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Error of each (layer, expert) per precision, relative to its layer's hidden states, and how often it was used."""

    errors: Mapping[Pair, Mapping[Precision, float]]
    uses: Mapping[Pair, int]
    tokens: int


def measure_sensitivity(
    checkpoint: Checkpoint,
    layout: ExpertLayout,
    ids: torch.Tensor,
    precisions: Sequence[Precision],
    dtype: torch.dtype,
    progress: Callable[[str], None] = lambda _: None,
) -> Sensitivity:
    """`ids` [sequences, tokens] are the calibration text. Errors are sums over tokens of the squared error of an expert's
    weighted output, over the sum of squares of the hidden states that leave its block.
    """
    model = _router(checkpoint, layout, dtype)
    energy: dict[int, float] = {}
    with Reader() as reader, torch.inference_mode(), _energies(model, layout, energy):
        backend = _Measuring(checkpoint, layout, reader, precisions, dtype, progress)
        with use_backend(backend):
            base = getattr(model, "base_model", model)  # without the vocabulary's logits
            base(input_ids=ids, use_cache=False)
    shape = layout.shape
    errors: dict[Pair, dict[Precision, float]] = {}
    for layer in range(shape.moe_layers):
        used = [expert for expert in range(shape.experts) if backend.uses.get((layer, expert))]
        for precision in precisions:
            total = sum(backend.errors[layer, expert][precision] for expert in used)
            per_use = total / max(sum(backend.uses[layer, expert] for expert in used), 1)
            for expert in range(shape.experts):
                measured = backend.errors[layer, expert].get(precision, UNUSED * per_use)
                errors.setdefault((layer, expert), {})[precision] = measured / max(energy[layer], 1e-30)
    uses = {pair: backend.uses.get(pair, 0) for pair in errors}
    return Sensitivity(errors, uses, ids.numel())


def _router(checkpoint: Checkpoint, layout: ExpertLayout, dtype: torch.dtype) -> nn.Module:
    try:
        return load_trunk(checkpoint, layout, dtype, attention="sdpa")
    except CheckpointError:  # models with attention sinks have none
        return load_trunk(checkpoint, layout, dtype, attention="eager")


@contextmanager
def _energies(model: nn.Module, layout: ExpertLayout, energy: dict[int, float]) -> Iterator[None]:
    """Fills in, per MoE layer, the sum of squares of the hidden states that leave its decoder block."""
    handles = []
    for ordinal, layer in enumerate(layout.layers):

        def record(_: nn.Module, __: Any, output: Any, ordinal: int = ordinal) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            energy[ordinal] = float(hidden.double().square().sum())

        handles.append(model.get_submodule(_block(model, layer.module)).register_forward_hook(record))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _block(model: nn.Module, module: str) -> str:
    """The decoder block around an experts module: the nearest module above it that a list holds."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if isinstance(model.get_submodule(".".join(parts[: length - 1])), nn.ModuleList):
            return ".".join(parts[:length])
    raise RuntimeError(f"{module} lies in no list of blocks")


@dataclass(slots=True)
class _Computed:
    rows: torch.Tensor  # [T, K, D]

    def result(self) -> torch.Tensor:
        return self.rows


@dataclass(slots=True)
class _Measuring:
    """An ExpertBackend that reads each activated expert, computes with it, and compares it with smaller ones."""

    checkpoint: Checkpoint
    layout: ExpertLayout
    reader: Reader
    precisions: Sequence[Precision]
    dtype: torch.dtype
    progress: Callable[[str], None]
    errors: dict[Pair, dict[Precision, float]] = field(default_factory=lambda: defaultdict(dict))
    uses: dict[Pair, int] = field(default_factory=dict)

    def submit(self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor) -> PendingRows:
        self.progress(f"layer {layer + 1} of {self.layout.shape.moe_layers}")
        weights = current_context().weights
        out = hidden.new_zeros(*top_k_index.shape, hidden.shape[1])
        for expert in top_k_index.unique().tolist():
            if expert < 0:
                continue
            token, slot = (top_k_index == expert).nonzero(as_tuple=True)  # [n] each
            plain = load_expert(self.reader, self.checkpoint, self.layout, layer, expert, self.dtype)
            rows = hidden[token]
            exact = out[token, slot] = compute(plain, rows, self.layout.shape.mlp)
            self.uses[layer, expert] = len(token)
            some = slice(ROWS)
            factor = 1.0 if weights is None else weights[token, slot][some, None].double()
            for precision in self.precisions:
                smaller = compute(plain.quantised(precision.bits, precision.group), rows[some], self.layout.shape.mlp)
                error = ((smaller.double() - exact[some].double()) * factor).square().sum()
                self.errors[layer, expert][precision] = float(error) * len(token) / min(ROWS, len(token))
        return _Computed(out)


def compute(weights: ExpertWeights, rows: torch.Tensor, mlp: ExpertMLP) -> torch.Tensor:
    """`rows` [n, D] through one expert."""
    return grouped_expert_mlp(
        rows,
        (len(rows),),
        (weights,),
        activation=mlp.activation,
        gated=mlp.gated,
        interleaved=mlp.interleaved,
        limit=mlp.limit,
        alpha=mlp.alpha,
    )
