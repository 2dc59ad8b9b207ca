"""The hop under the overflow policy `backup`: rows of an expert whose holders are all overrun go to their next-best one.

Groups choose it for the experts they hold. Rows keep the weight that the gate gave their own expert.
Legend: T tokens, K experts per token, E experts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from moiety.config.application import HOT
from moiety.core.expert_backend import PendingRows
from moiety.model.seam import current_context
from moiety.policy.backup_experts import backups
from moiety.policy.dispatch import HolderTable
from moiety.router.step_context import StepBackend, StepContext

REMEMBER_S = 1.0  # a replica that is asked for nothing has no queue: what it told is forgotten after that


class QueueWaits:
    """How long calls waited at each replica lately. For the engine's thread."""

    def __init__(self, bound_ms: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._bound_ms, self._clock = bound_ms, clock
        self._overrun: dict[str, float] = {}  # replica -> when it last told of a longer wait than the bound

    def answered(self, replica: str, queue_ms: float) -> None:
        """What a reply tells."""
        if queue_ms > self._bound_ms:
            self._overrun[replica] = self._clock()
        elif self._overrun:
            self._overrun.pop(replica, None)

    def overrun(self) -> frozenset[str]:
        """Replicas whose queue is too long now."""
        if not self._overrun:
            return frozenset()
        since = self._clock() - REMEMBER_S
        self._overrun = {replica: told for replica, told in self._overrun.items() if told > since}
        return frozenset(self._overrun)


@dataclass(frozen=True, slots=True)
class Masks:
    """Experts of one layer, both bool [E]."""

    spared: np.ndarray  # their rows may go elsewhere
    overrun: np.ndarray  # these, and those whose rows may only wait: nobody is sent there


class OverrunExperts:
    """Which experts' rows may go elsewhere: no holder could take more of them, and their group says so.

    By the queues and the table of the moment. Hot sets hold what groups hold too, and have no say in it.
    """

    def __init__(
        self,
        queues: QueueWaits,
        table: Callable[[], HolderTable],
        deployment_of: Callable[[str], str],
        spares: Callable[[str], bool],
        slices: int = 1,
    ) -> None:
        """`deployment_of(replica)`: "" where it has left; `spares(group)`: whether its rows may go elsewhere."""
        self._queues, self._table, self._slices = queues, table, slices
        self._deployment_of, self._spares = deployment_of, spares
        self._masks: dict[int, Masks | None] = {}  # by layer
        self._of: tuple[int, frozenset[str]] = (0, frozenset())  # what they were made of: table version, replicas

    def __call__(self, layer: int) -> Masks | None:
        """None where no rows may go.

        An expert in slices is overrun where one of them is, and its rows may go where that holds for all of them.
        """
        if not (replicas := self._queues.overrun()):
            return None
        table = self._table()
        if self._of != (table.version, replicas):
            self._of, self._masks = (table.version, replicas), {}
        if layer not in self._masks:
            overrun = np.logical_or.reduce(self._experts(table.held_only_by(layer, replicas)), axis=1)
            spared = overrun & np.logical_and.reduce(self._experts(self._may_go(table, layer)), axis=1)
            self._masks[layer] = Masks(spared, overrun) if spared.any() else None
        return self._masks[layer]

    def _may_go(self, table: HolderTable, layer: int) -> np.ndarray:
        """bool [E * slices]: those held by groups, all of which say so."""
        of = {replica: self._deployment_of(replica) for replica in table.replicas}
        hot = {replica for replica, deployment in of.items() if deployment.startswith(HOT)}
        willing = {replica for replica, deployment in of.items() if deployment and self._spares(deployment)}
        return table.held_only_by(layer, willing | hot) & ~table.held_only_by(layer, hot)

    def _experts(self, slices: np.ndarray) -> np.ndarray:
        return slices.reshape(-1, self._slices)


class OverflowHop:
    """A StepBackend that spares experts which no replica can take more rows for."""

    def __init__(self, backend: StepBackend, overrun: Callable[[int], Masks | None]) -> None:
        """`overrun(layer)`: experts all of whose holders have too long a queue; None = no rows may go elsewhere."""
        self._backend, self._overrun = backend, overrun
        self._step: StepContext | None = None
        self.rerouted = 0  # rows, since the beginning

    @property
    def layer_began_ns(self) -> int:
        return self._backend.layer_began_ns

    def begin_step(self, step: StepContext) -> None:
        self._step = step
        self._backend.begin_step(step)

    def submit(self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor) -> PendingRows:
        """Sends hidden [T, D] to the experts in top_k_index [T, K] (int64, -1: none), or to their backups."""
        assert self._step is not None, "submit outside a step"
        masks, scores = self._overrun(layer), current_context().scores
        if masks is None or scores is None:
            self._step.routed(np.zeros(top_k_index.shape, dtype=bool))
            return self._backend.submit(layer, hidden, top_k_index)
        chosen = top_k_index.cpu().numpy()
        given = backups(chosen, scores.float().cpu().numpy(), masks.spared, masks.overrun)
        self._step.routed(elsewhere := given != chosen)
        self.rerouted += int(elsewhere.sum())
        return self._backend.submit(layer, hidden, torch.from_numpy(given).to(top_k_index.device))

    def poll(self) -> None:
        self._backend.poll()
