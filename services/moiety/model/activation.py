"""The activation of a model's experts in the form that kernels take."""

from __future__ import annotations

from moiety.core.experts import ExpertMLP
from moiety_kernels import Activation


def activation_of(mlp: ExpertMLP) -> Activation:
    """Returns the activation that `mlp` declares; raises ValueError if no kernel computes it."""
    return Activation(mlp.activation, mlp.gated, mlp.interleaved, mlp.limit, mlp.alpha)
