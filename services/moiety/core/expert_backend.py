"""The protocol through which a model reaches its routed experts, wherever they are computed.

Legend: T tokens, K experts per token (top-k), D hidden size.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class CallClass(StrEnum):
    """The kind of tokens in a call; where both wait, decode calls go before prefill calls."""

    DECODE = "decode"
    PREFILL = "prefill"


class PendingRows(Protocol):
    """Rows that were sent to experts and whose outputs are still to come."""

    def result(self) -> torch.Tensor:
        """Waits for the expert outputs, [T, K, D], unweighted, in the model dtype; zero where there is no expert.

        Raises HopFailed.
        """
        ...


class ExpertBackend(Protocol):
    """Computes a model's routed experts. The seam (`model/seam.py`) calls it once per MoE layer."""

    def submit(self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor) -> PendingRows:
        """Starts the experts of layer `layer` for hidden [T, D] routed to top_k_index [T, K] (int64, -1 = no expert)."""
        ...
