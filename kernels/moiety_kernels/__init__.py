"""Kernels of the expert service: one operation per file, each tested against `reference`."""

from moiety_kernels.expert_mlp import grouped_expert_mlp
from moiety_kernels.matrices import Fp8Matrix, Int4Matrix, Int8Matrix, Matrix, Mxfp4Matrix
from moiety_kernels.reference import ACTIVATIONS, activate, expert_mlp
from moiety_kernels.weights import ExpertWeights

__all__ = [
    "ACTIVATIONS",
    "ExpertWeights",
    "Fp8Matrix",
    "Int4Matrix",
    "Int8Matrix",
    "Matrix",
    "Mxfp4Matrix",
    "activate",
    "expert_mlp",
    "grouped_expert_mlp",
]
