"""The expert layout of a checkpoint: the shape of its MoE layers, and which tensors hold each expert's weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moiety.core.experts import ModelShape


@dataclass(frozen=True, slots=True)
class LayerLayout:
    """One MoE layer: the path of its experts module in the model, and the tensors that hold its experts.

    `sources` maps each field of moiety_kernels.ExpertWeights to the names of its tensors; each expert's parts are
    concatenated along their rows. A name with `{expert}` stands for one tensor per expert. Any other name is a fused
    tensor, which holds one expert after the other along dim 0. Matrices of the fields in `transposed` are published
    [in, out]. All matrices are held [out, in].
    """

    module: str
    sources: Mapping[str, tuple[str, ...]]
    transposed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """The expert layout of a model: its shape, and the layout of each of its MoE layers, in order."""

    shape: ModelShape
    layers: tuple[LayerLayout, ...]
