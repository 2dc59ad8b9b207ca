"""Kernels for experts and for a router's CPU layers, one operation per file. `ops` holds what services call."""

from moiety_kernels.ops.expert_mlp import grouped_expert_mlp
from moiety_kernels.reference.activation import ACTIVATIONS, SWIGLU, Activation, activate
from moiety_kernels.reference.expert_mlp import expert_mlp
from moiety_kernels.weights.expert_weights import ExpertWeights
from moiety_kernels.weights.fp8 import Fp8Matrix
from moiety_kernels.weights.int4 import Int4Matrix
from moiety_kernels.weights.int8 import Int8Matrix
from moiety_kernels.weights.matrix import Matrix
from moiety_kernels.weights.mxfp4 import Mxfp4Matrix

__all__ = [
    "ACTIVATIONS",
    "SWIGLU",
    "Activation",
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
