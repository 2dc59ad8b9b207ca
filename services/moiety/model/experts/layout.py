"""The expert layout of a checkpoint: the shape of its MoE layers, and which tensors hold each expert's weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moiety.core.experts import ModelShape


@dataclass(frozen=True, slots=True)
class LayerLayout:
    """One MoE layer: where its experts sit in the model and which tensors they are read from.

    `sources` maps each parameter (a field of moiety_kernels.ExpertWeights) to the tensors it is concatenated from, along
    an expert's own dimension 0. A name with `{expert}` in it is one tensor per expert; a name without is a fused tensor,
    one expert after the other along dim 0. Matrices of the fields in `transposed` are published [in, out]; they are held
    [out, in], as all others.
    """

    module: str
    sources: Mapping[str, tuple[str, ...]]
    transposed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """A model's shape and, per MoE layer ordinal, where its experts are published."""

    shape: ModelShape
    layers: tuple[LayerLayout, ...]
