"""The hop under the overflow policy `backup`: if all holders of an expert are overrun, its rows go to their next-best expert.

A replica is overrun if its latest report of a queue wait is above the bound and at most REMEMBER_S old. Each group
sets the policy for the experts it holds. A row keeps the weight that the gate gave its original expert.
Legend: T tokens, K experts per token, E experts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from moiety.config.application import HOT
from moiety.core.expert_backend import ExpertBackend, PendingRows
from moiety.model.seam import current_context
from moiety.policy.backup_experts import backups
from moiety.policy.dispatch import HolderTable
from moiety.router.step_context import StepContext

REMEMBER_S = 1.0  # how long a reported wait counts: a replica that gets no calls has no queue and reports nothing


class OverrunReplicas:
    """The replicas whose last reply reported too long a queue wait. Used by the engine's thread only."""

    def __init__(self, bound_ms: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._bound_ms, self._clock = bound_ms, clock
        self._overrun: dict[str, float] = {}  # replica -> when it last reported a wait beyond the bound

    def record(self, replica: str, queue_ms: float) -> None:
        """Records the queue wait that a reply of `replica` reports."""
        if queue_ms > self._bound_ms:
            self._overrun[replica] = self._clock()
        elif self._overrun:
            self._overrun.pop(replica, None)

    def overrun(self) -> frozenset[str]:
        """Returns the overrun replicas: the latest report is above the bound and at most REMEMBER_S old."""
        if not self._overrun:
            return frozenset()
        since = self._clock() - REMEMBER_S
        self._overrun = {replica: reported for replica, reported in self._overrun.items() if reported > since}
        return frozenset(self._overrun)


@dataclass(frozen=True, slots=True)
class Masks:
    """Which experts of one layer are overrun, and which of these may pass rows to other experts. Masks: bool [E]."""

    spared: np.ndarray  # overrun, and their rows may go to another expert
    overrun: np.ndarray  # all overrun experts, also those whose rows have to wait: no row is rerouted to them


class OverrunExperts:
    """Finds the experts whose rows may go elsewhere: all their holders are overrun, and their group's policy is `backup`.

    Decides by the current queues and holder table. Hot sets only copy experts of groups, so their policy does not count.
    """

    def __init__(
        self,
        queues: OverrunReplicas,
        table: Callable[[], HolderTable],
        deployment_of: Callable[[str], str],
        spares: Callable[[str], bool],
        slices: int = 1,
    ) -> None:
        """`deployment_of(replica)`: "" if the replica has left. `spares(group)`: whether the group's policy is `backup`."""
        self._queues, self._table, self._slices = queues, table, slices
        self._deployment_of, self._spares = deployment_of, spares
        self._masks: dict[int, Masks | None] = {}  # by layer
        self._built_for: tuple[int, frozenset[str]] = (0, frozenset())  # the masks' table version, overrun replicas
        self.rerouted = 0  # rows that all lanes have sent to backups since the start

    def __call__(self, layer: int) -> Masks | None:
        """Returns which experts of `layer` are overrun, and which of these may pass rows to other experts; None if none may.

        A sliced expert is overrun if one of its slices is. Its rows may go elsewhere only if all groups that hold one of its
        slices have the policy `backup`.
        """
        if not (replicas := self._queues.overrun()):
            return None
        table = self._table()
        if self._built_for != (table.version, replicas):
            self._built_for, self._masks = (table.version, replicas), {}
        if layer not in self._masks:
            overrun = np.logical_or.reduce(self._experts(table.held_only_by(layer, replicas)), axis=1)
            spared = overrun & np.logical_and.reduce(self._experts(self._may_go(table, layer)), axis=1)
            self._masks[layer] = Masks(spared, overrun) if spared.any() else None
        return self._masks[layer]

    def _may_go(self, table: HolderTable, layer: int) -> np.ndarray:
        """Returns bool [E * slices]: the slices that a group holds and that no group without the policy `backup` holds."""
        deployments = {replica: self._deployment_of(replica) for replica in table.replicas}
        hot = {replica for replica, deployment in deployments.items() if deployment.startswith(HOT)}
        willing = {replica for replica, deployment in deployments.items() if deployment and self._spares(deployment)}
        return table.held_only_by(layer, willing | hot) & ~table.held_only_by(layer, hot)

    def _experts(self, slices: np.ndarray) -> np.ndarray:
        return slices.reshape(-1, self._slices)


@dataclass(frozen=True, slots=True)
class BackupExperts:
    """The ExpertBackend of one step that sends rows of overrun experts to their backups, where the policy allows it."""

    backend: ExpertBackend
    step: StepContext
    overrun: OverrunExperts

    def submit(self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor) -> PendingRows:
        """Sends hidden [T, D] to the experts in top_k_index [T, K] (int64, -1: none), or to their backups."""
        masks, scores = self.overrun(layer), current_context().scores
        if masks is None or scores is None:
            self.step.report_rerouted(np.zeros(top_k_index.shape, dtype=bool))
            return self.backend.submit(layer, hidden, top_k_index)
        chosen = top_k_index.cpu().numpy()
        assigned = backups(chosen, scores.float().cpu().numpy(), masks.spared, masks.overrun)
        self.step.report_rerouted(elsewhere := assigned != chosen)
        self.overrun.rerouted += int(elsewhere.sum())
        return self.backend.submit(layer, hidden, torch.from_numpy(assigned).to(top_k_index.device))
