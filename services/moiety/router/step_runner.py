"""Runs a step's tokens through the model: in one pass, or split into lanes where that was measured to be faster."""

from __future__ import annotations

import time
from collections import abc
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from moiety.errors import HopFailed
from moiety.model.seam import forward_context
from moiety.policy.lane_tuner import LaneTuner
from moiety.router.attention.step_batch import CrossAttentionBatch, StepBatch
from moiety.router.cache.kv_cache import KVCache
from moiety.router.lanes import Lanes
from moiety.router.sequence.sequence import Sequence
from moiety.router.sequence.step_plan import StepPlan
from moiety.router.step_context import StepBackend, StepContext
from moiety_kernels import threads
from moiety_kernels.ops.linear import PACKED_ROWS


class StepRunner:
    """Runs step plans through one model. Only one thread may use it."""

    def __init__(
        self,
        model: torch.nn.Module,
        cache: KVCache,
        backends: abc.Sequence[StepBackend],
        lanes: Lanes | None = None,
        tuner: LaneTuner | None = None,
    ):
        """Takes one backend per lane. Without a `tuner`, a step with several sequences uses all lanes."""
        self._model, self._cache, self._backends, self._lanes, self._tuner = model, cache, backends, lanes, tuner
        self._device = next(model.parameters()).device
        self._threads = torch.get_num_threads()

    @property
    def last_layer_ns(self) -> int:
        """Unix time in nanoseconds at which the last layer of the last step was done."""
        return max(backend.layer_began_ns for backend in self._backends)

    def use_threads(self, count: int) -> None:
        """Computes with at most `count` threads. The thread that runs steps must make this call."""
        self._threads = count
        threads.set_thread_limit(count)

    def poll(self) -> None:
        """Handles late answers and changes of the holder table, without waiting. An idle engine thread calls this regularly."""
        self._backends[0].poll()

    @torch.inference_mode()
    def run(self, plan: StepPlan, step: StepContext) -> torch.Tensor:
        """Returns logits [R, V] of the tokens that need them, in plan order. Raises HopFailed, or what `step.check` raises."""
        # Up to PACKED_ROWS tokens our kernels do the work that is worth several threads; torch uses one for the rest.
        torch.set_num_threads(1 if plan.work <= PACKED_ROWS else self._threads)
        if self._lanes is None or len(self._backends) == 1 or len(plan.scheduled) == 1:
            return self._run_part(self._backends[0], plan, 0, step)
        size = plan.call_class, plan.work.bit_length()
        count = len(self._backends) if self._tuner is None else self._tuner.choose(size)
        tasks: list[Callable[[], torch.Tensor]] = []
        offset = 0
        for backend, part in zip(self._backends, plan.split(count), strict=False):
            tasks.append(partial(self._run_part, backend, part, offset, step))
            offset += part.tokens
        began = time.perf_counter()
        logits = self._lanes.run(tasks)
        if self._tuner is not None:
            self._tuner.observe(size, count, time.perf_counter() - began)
        return torch.cat(logits)

    def _run_part(self, backend: StepBackend, plan: StepPlan, offset: int, step: StepContext) -> torch.Tensor:
        """Runs `plan`, one lane's part of a step, and returns its logits. `offset` tokens of the step come before this part."""
        ids: list[int] = []
        wanted: list[int] = []  # positions of tokens that need logits
        for item in plan.scheduled:
            ids += item.ids
            wanted += range(len(ids) - item.wanted, len(ids))
        sequences = [item.sequence for item in plan.scheduled]
        counts = [item.count for item in plan.scheduled]
        batch = StepBatch.build(
            self._cache,
            [sequence.table for sequence in sequences],
            [sequence.computed for sequence in sequences],
            counts,
            self._device,
            self._cross_attention(sequences, counts),
        )
        experts = backend.begin_step(replace(step, report_rerouted=partial(_note_routed, plan)))
        try:
            with forward_context(experts, batch):
                output = self._model(
                    input_ids=torch.tensor([ids], device=self._device),
                    position_ids=batch.positions[None],
                    use_cache=False,
                    logits_to_keep=torch.tensor(wanted or [0], device=self._device),
                )
        except HopFailed as failed:
            raise HopFailed([offset + token for token in failed.tokens], failed.cause) from failed
        logits: torch.Tensor = output.logits[0]
        return logits[: len(wanted)]

    def _cross_attention(
        self, sequences: abc.Sequence[Sequence], counts: abc.Sequence[int]
    ) -> CrossAttentionBatch | None:
        """Builds the batch of the sequences' prompts, encoded before or in this step; None for decoder-only models."""
        if not any(sequence.encoder_ids for sequence in sequences):
            return None
        return CrossAttentionBatch.build(
            self._cache,
            [sequence.encoder_ids for sequence in sequences],
            [sequence.cross_table for sequence in sequences],
            [not sequence.encoded for sequence in sequences],
            counts,
            self._device,
        )


def _note_routed(plan: StepPlan, rerouted: np.ndarray) -> None:
    """Adds the rows of one MoE layer to the counts of the sequences that own them.

    `rerouted`, bool [T, K], says which rows went to another expert than the gate's.
    """
    start = 0
    for item in plan.scheduled:
        end = start + len(item.ids)
        item.sequence.routed_rows += rerouted[start:end].size
        item.sequence.rerouted_rows += int(rerouted[start:end].sum())
        start = end
