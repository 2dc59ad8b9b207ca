"""Computes the floor of a decode step: the least time to read the step's weights and then compute its products.

Keys and values are not counted: at the contexts of the benchmarks they are a few percent of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from moiety.model.checkpoint.checkpoint import EXPERT, Checkpoint
from moiety.model.checkpoint.quantised import Stored
from moiety.model.experts.layout import ExpertLayout
from moiety.tools.machine_speed import MachineSpeed


@dataclass(frozen=True, slots=True)
class StepCost:
    """Numbers of parameters of a model's parts. The methods compute the cost of a decode step from them."""

    router: int  # parameters of the trunk, without the input embedding (a step reads only one row of it per token)
    expert: int  # parameters of one expert of one layer
    moe_layers: int
    experts: int  # per layer
    top_k: int

    @classmethod
    def of(cls, checkpoint: Checkpoint, layout: ExpertLayout) -> StepCost:
        """Counts the parameters from the headers of a checkpoint. Reads no weights."""
        shape = layout.shape
        owned = {
            name.replace(EXPERT, str(expert))
            for layer in layout.layers
            for names in layer.sources.values()
            for name in names
            for expert in range(shape.experts)
        }
        in_experts = sum(_size(entry) for name, entry in checkpoint.tensors.items() if name in owned)
        others = [entry for name, entry in checkpoint.tensors.items() if name not in owned]
        tables = [entry for entry in others if entry.shape == (shape.vocabulary, shape.mlp.hidden)]
        # Two tables: input embedding and output projection. One table: the two are tied, and the projection reads it all.
        unread = _size(tables[0]) if len(tables) > 1 else 0
        return cls(
            router=sum(map(_size, others)) - unread,
            expert=in_experts // (shape.moe_layers * shape.experts),
            moe_layers=shape.moe_layers,
            experts=shape.experts,
            top_k=shape.top_k,
        )

    def activated(self, tokens: int) -> float:
        """Returns the expected number of distinct experts that `tokens` tokens activate in a layer if routing is even."""
        return self.experts * (1 - (1 - self.top_k / self.experts) ** tokens)

    def streamed_bytes(self, tokens: int, router_width: float, expert_width: float) -> float:
        """Returns the weight bytes that a step of `tokens` tokens reads. Each width is a number of bytes per parameter."""
        return self.router * router_width + self.moe_layers * self.activated(tokens) * self.expert * expert_width

    def flops(self, tokens: int) -> float:
        """Returns the operations of a step of `tokens` tokens: for each token, a product and a sum per parameter it uses."""
        return 2.0 * tokens * (self.router + self.moe_layers * self.top_k * self.expert)

    def floor_s(self, tokens: int, speed: MachineSpeed, dtype: str, expert_width: float | None = None) -> float:
        """Returns the floor in seconds of a step of `tokens` tokens on a machine of speed `speed`.

        `expert_width` is the number of bytes per expert parameter; None = the width of `dtype`.
        """
        width = 4.0 if dtype == "float32" else 2.0
        streamed = self.streamed_bytes(tokens, width, width if expert_width is None else expert_width)
        return streamed / speed.read_bytes_per_s + self.flops(tokens) / speed.flops(dtype)


def _size(entry: Stored) -> int:
    return prod(entry.shape)
