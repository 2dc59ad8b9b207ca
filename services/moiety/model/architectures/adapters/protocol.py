"""The adapter protocol: describes a module that holds routed experts, and patches its block to call the seam."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from moiety.core.experts import ExpertMLP


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of an experts module: its path below the module and its shape, [E, rows, columns] or, a bias, [E, rows]."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RoutedExperts:
    """What one module's routed experts compute, and from which parameters.

    `parameters` maps each field of moiety_kernels.ExpertWeights to the parameters that are concatenated into it, along an
    expert's own dimension 0. Parameters of the fields in `transposed` hold [in, out] instead of [out, in].
    """

    mlp: ExpertMLP
    parameters: Mapping[str, tuple[Parameter, ...]]
    transposed: frozenset[str] = frozenset()

    @property
    def experts(self) -> int:
        return self.parameters["down"][0].shape[0]


class Adapter(Protocol):
    """Serves one class of modules that hold routed experts."""

    def recognise(self, module: Any) -> RoutedExperts:
        """Describes `module`, which may be on meta. Raises ValueError if no kernel computes it."""
        ...

    def patch(self, block: Any, module: Any) -> None:
        """Makes `block`, which routes tokens to its child `module`, call `seam.remote_experts` instead of computing."""
        ...
