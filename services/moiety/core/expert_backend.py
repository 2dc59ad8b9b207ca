"""The protocol through which a model reaches its routed experts, wherever they are computed.

Legend: T tokens, K experts per token (top-k), D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class CallClass(StrEnum):
    """Whether a call belongs to decode or to prefill. An expert replica serves waiting decode calls before prefill calls."""

    DECODE = "decode"
    PREFILL = "prefill"


class PendingRows(Protocol):
    """Rows that were sent to experts and whose outputs are still to come."""

    def result(self) -> torch.Tensor:
        """Waits for the expert outputs, [T, K, D], unweighted, in the model's dtype. For "no expert" (-1) they are zeros.

        Raises HopFailed if the layer could not be computed for some tokens.
        """
        ...


@dataclass(frozen=True, slots=True)
class ComputedRows:
    """A PendingRows whose outputs, [T, K, D], are there already."""

    rows: torch.Tensor

    def result(self) -> torch.Tensor:
        return self.rows


class ExpertBackend(Protocol):
    """Computes a model's routed experts. The seam (`model/seam.py`) calls it once per MoE layer."""

    def submit(self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor) -> PendingRows:
        """Sends hidden [T, D] to the experts top_k_index [T, K] (int64, -1 = no expert) of MoE layer `layer`."""
        ...
