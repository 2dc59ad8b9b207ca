"""Where a model's routed experts are computed: the protocol between model and hop.

Legend: T tokens, K experts per token (top-k), D hidden size.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class CallClass(StrEnum):
    """Decode calls go before prefill calls wherever both wait."""

    DECODE = "decode"
    PREFILL = "prefill"


class PendingRows(Protocol):
    """Rows on their way back from the experts."""

    def result(self) -> torch.Tensor:
        """Blocks for the expert outputs, [T, K, D], unweighted, in the model dtype; no expert's is zero. Raises HopFailed."""
        ...


class ExpertBackend(Protocol):
    """Where a model's routed experts are computed. The seam (`model/seam.py`) calls it once per MoE layer."""

    def submit(self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor) -> PendingRows:
        """Starts layer `layer` for hidden [T, D] routed to top_k_index [T, K] (int64, -1 = no expert)."""
        ...
