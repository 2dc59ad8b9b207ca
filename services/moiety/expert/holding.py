"""The experts that a replica holds, and their weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moiety.core.experts import ExpertSet
from moiety.errors import NotHeld
from moiety.wire.frames import ForwardCall
from moiety_kernels.weights.expert_table import ExpertTable


@dataclass(frozen=True, slots=True)
class Holding:
    """The experts that a replica holds and their weights, as one value that is replaced as a whole.

    A batch is checked against one Holding and computed with its weights, even if the replica gets a new Holding meanwhile.
    """

    held: ExpertSet  # by the placement of `epoch`
    leaving: ExpertSet  # of earlier placements: still computed until `Runtime.drop_leaving`
    epoch: int  # of the placement; 0 = none yet
    layers: Mapping[int, ExpertTable]  # by MoE layer: the weights of the experts in `held` and `leaving`

    def check(self, call: ForwardCall) -> None:
        """Raises NotHeld unless the replica holds every expert of the call."""
        held, wanted = self.held.layer(call.layer), call.experts.tolist()
        if leaving := self.leaving.by_layer:
            held |= leaving.get(call.layer, frozenset())
        if not held.issuperset(wanted):
            missing = sorted(set(wanted) - held)
            raise NotHeld(f"layer {call.layer}: expert(s) {missing} are not held here (epoch {self.epoch})")
