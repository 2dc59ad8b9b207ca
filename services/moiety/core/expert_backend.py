"""The protocol through which a model reaches its routed experts, wherever they are computed.

Legend: T tokens, K experts per token (top-k), D hidden size.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class CallClass(StrEnum):
    """Whether a call's tokens are decoded or prefilled. An expert replica serves waiting decode calls before prefill calls."""

    DECODE = "decode"
    PREFILL = "prefill"


class PendingRows(Protocol):
    """Rows that were sent to experts and whose outputs are still to come."""

    def result(self) -> torch.Tensor:
        """Waits for the expert outputs, [T, K, D], unweighted, in the model dtype; zeros where top_k_index was -1.

        Raises HopFailed.
        """
        ...


class ExpertBackend(Protocol):
    """Computes a model's routed experts. The seam (`model/seam.py`) calls it once per MoE layer."""

    def submit(self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor) -> PendingRows:
        """Sends hidden [T, D] to the experts top_k_index [T, K] (int64, -1 = no expert) of MoE layer `layer`."""
        ...
