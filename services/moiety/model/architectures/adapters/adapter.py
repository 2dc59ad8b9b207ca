"""The adapter of an architecture: what transformers' config, classes and experts interface do not give Moiety alone."""

from __future__ import annotations

from typing import Any

from torch import nn

from moiety.model.architectures.recognise import RoutedExperts, recognise


class Adapter:
    """Adapts one architecture. The defaults serve an architecture that uses transformers' experts interface."""

    # transformers' class of the routed experts, if it computes them outside its experts interface.
    experts_class: str | None = None

    def amend(self, config: Any) -> None:
        """Sets values that `config` lacks or has in an unusual place. Raises ValueError if `config` cannot be served."""

    def published_class(self, model_class: type[nn.Module]) -> type[nn.Module]:
        """Returns the class whose weights are those of published checkpoints, from transformers' `model_class`."""
        return model_class

    def holds_experts(self, module: nn.Module) -> bool:
        """Whether `module` is the routed experts of a MoE layer."""
        if self.experts_class is not None:
            return type(module).__name__ == self.experts_class
        # `use_experts_implementation` leaves no mark on a class except its closure over the registry of experts functions.
        code = getattr(type(module).forward, "__code__", None)
        return code is not None and "experts_interface" in code.co_freevars

    def recognise(self, module: Any) -> RoutedExperts:
        """Describes the experts in `module`, which may be on the meta device. Raises ValueError if no kernel computes them."""
        return recognise(module)

    def patch(self, block: Any, module: Any) -> None:
        """Makes `block` get the output of its child `module`, which holds the experts, from `seam.remote_experts`.

        The experts interface does so by itself.
        """
