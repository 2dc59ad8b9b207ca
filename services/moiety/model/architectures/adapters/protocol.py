"""The adapter protocol: an adapter describes a module of routed experts, and makes the block around it call the seam."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from moiety.core.experts import ExpertMLP


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of an experts module: its name within the module, and its shape.

    The shape is [E, rows, columns], or [E, rows] for a bias; E is the number of experts.
    """

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RoutedExperts:
    """What one module's routed experts compute, and from which parameters.

    `parameters` maps each field of moiety_kernels.ExpertWeights to the parameters that make it up: each expert's parts are
    concatenated along `rows`. Parameters of the fields in `transposed` hold [in, out] instead of [out, in].
    """

    mlp: ExpertMLP
    parameters: Mapping[str, tuple[Parameter, ...]]
    transposed: frozenset[str] = frozenset()

    @property
    def experts(self) -> int:
        return self.parameters["down"][0].shape[0]


class Adapter(Protocol):
    """The interface of an adapter. An adapter serves one class of transformers modules that hold routed experts."""

    def recognise(self, module: Any) -> RoutedExperts:
        """Describes the experts in `module`, which may be on the meta device. Raises ValueError if no kernel computes them."""
        ...

    def patch(self, block: Any, module: Any) -> None:
        """Makes `block` get the output of its child `module`, which holds the experts, from `seam.remote_experts`."""
        ...
