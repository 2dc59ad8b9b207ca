"""Measures each expert's sensitivity: the error of a model's hidden states when the expert is stored in fewer bits.

Runs one forward pass of the trunk over calibration text. At each MoE layer it reads the experts one at a time and computes
each with its stored weights, and again at every smaller precision. The forward pass continues with the result of the
stored weights. Of the weights, memory holds only the trunk and one expert at a time.

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

from moiety.core.expert_backend import ComputedRows
from moiety.core.experts import ExpertMLP
from moiety.errors import CheckpointError
from moiety.model.activation import activation_of
from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.checkpoint.reading import Reader
from moiety.model.experts.layout import ExpertLayout
from moiety.model.experts.read import load_expert
from moiety.model.seam import current_context, forward_context
from moiety.model.trunk.read import load_trunk
from moiety.policy.precision import Precision
from moiety_kernels import ExpertWeights, grouped_expert_mlp

ROWS = 512  # most rows per expert to measure its error on; further rows are assumed to have the same mean error
UNUSED = 0.5  # uses that count for an expert that no token of the calibration text chose

Pair = tuple[int, int]  # MoE layer, expert


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What was measured of each expert: its error at each precision, and how many tokens used it."""

    errors: Mapping[Pair, Mapping[Precision, float]]  # relative to the hidden states of the expert's layer
    uses: Mapping[Pair, int]
    tokens: int  # of the calibration text


def measure_sensitivity(
    checkpoint: Checkpoint,
    layout: ExpertLayout,
    ids: torch.Tensor,
    precisions: Sequence[Precision],
    dtype: torch.dtype,
    progress: Callable[[str], None] = lambda _: None,
) -> Sensitivity:
    """Measures every expert on the calibration text `ids` [sequences, tokens].

    The error of an expert at a precision is the sum over its tokens of the squared change of routing weight times output,
    scaled up from at most ROWS tokens. An expert without tokens gets UNUSED times its layer's mean error per use. Each error
    is divided by the sum of squares of the hidden states that leave the expert's decoder block.
    """
    model = _trunk(checkpoint, layout, dtype)
    energy: dict[int, float] = {}
    with Reader() as reader, torch.inference_mode(), _energies(model, layout, energy):
        backend = _Measuring(checkpoint, layout, reader, precisions, dtype, progress)
        with forward_context(backend):
            base = getattr(model, "base_model", model)  # skips the logits over the vocabulary
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


def _trunk(checkpoint: Checkpoint, layout: ExpertLayout, dtype: torch.dtype) -> nn.Module:
    try:
        return load_trunk(checkpoint, layout, dtype, attention="sdpa")
    except CheckpointError:  # models with attention sinks do not support sdpa
        return load_trunk(checkpoint, layout, dtype, attention="eager")


@contextmanager
def _energies(model: nn.Module, layout: ExpertLayout, energy: dict[int, float]) -> Iterator[None]:
    """Records in `energy`, per MoE layer, the sum of squares of the hidden states that leave its decoder block."""
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
    """Returns the path of the decoder block that contains `module`: the innermost item of a ModuleList on its path."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if isinstance(model.get_submodule(".".join(parts[: length - 1])), nn.ModuleList):
            return ".".join(parts[:length])
    raise RuntimeError(f"{module} is not inside a list of blocks")


@dataclass(slots=True)
class _Measuring:
    """An ExpertBackend that computes each activated expert, and measures the error of its output at each precision."""

    checkpoint: Checkpoint
    layout: ExpertLayout
    reader: Reader
    precisions: Sequence[Precision]
    dtype: torch.dtype
    progress: Callable[[str], None]
    errors: dict[Pair, dict[Precision, float]] = field(default_factory=lambda: defaultdict(dict))
    uses: dict[Pair, int] = field(default_factory=dict)

    def submit(self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor) -> ComputedRows:
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
            sample = slice(ROWS)
            factor = 1.0 if weights is None else weights[token, slot][sample, None].double()
            for precision in self.precisions:
                smaller = compute(plain.quantised(precision.bits, precision.group), rows[sample], self.layout.shape.mlp)
                error = ((smaller.double() - exact[sample].double()) * factor).square().sum()
                self.errors[layer, expert][precision] = float(error) * len(token) / min(ROWS, len(token))
        return ComputedRows(out)


def compute(weights: ExpertWeights, rows: torch.Tensor, mlp: ExpertMLP) -> torch.Tensor:
    """Returns the output [n, D] of one expert for `rows` [n, D]."""
    return grouped_expert_mlp(rows, (len(rows),), (weights,), activation_of(mlp))
