"""Computes rows on one device, and tells a device that is sick from rows that no device could compute."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moiety.core.experts import ExpertMLP
from moiety.errors import MoietyError
from moiety.expert.fault import Fault
from moiety.model.activation import activation_of
from moiety.wire.finite import all_finite, non_finite_rows
from moiety.wire.rows import RowBuffer
from moiety_kernels.ops.expert_mlp import grouped_expert_mlp
from moiety_kernels.weights.expert_weights import ExpertWeights


class Device:
    """One device, used by one thread, in inference mode. Rows arrive and return in `wire_dtype`, weights have `dtype`.

    `deterministic`: the bits of a row do not depend on the batch that computes it.
    """

    def __init__(
        self, mlp: ExpertMLP, dtype: torch.dtype, device: str, *, wire_dtype: torch.dtype, deterministic: bool
    ):
        self.fault: Fault | None = None  # for trials: what the device does wrong; may be set from any thread
        self._activation, self._hidden = activation_of(mlp), mlp.hidden
        self._dtype, self._wire_dtype, self._device = dtype, wire_dtype, torch.device(device)
        self._deterministic = deterministic

    def empty(self, count: int) -> torch.Tensor:
        """Returns host memory [A, D] for the rows of a batch."""
        # Pinned for a GPU, so that this thread does not wait for the copy to the device.
        return torch.empty(count, self._hidden, dtype=self._wire_dtype, pin_memory=self._device.type == "cuda")

    def compute(self, rows: torch.Tensor, counts: Sequence[int], weights: Sequence[ExpertWeights]) -> RowBuffer:
        """Returns the outputs [A], on the host, of rows [A, D] sorted by expert: counts[i] rows for weights[i].

        Raises MoietyError if finite rows give other outputs and the device is to blame. If it computes other rows well,
        the outputs are returned: such rows overflow on any device.
        """
        outputs = RowBuffer.of(self._run(rows, counts, weights))
        if not all_finite(outputs, self._wire_dtype):
            wrong = non_finite_rows(outputs, self._wire_dtype)
            if (wrong & ~non_finite_rows(RowBuffer.of(rows), self._wire_dtype)).any():
                self.probe(weights)
        return outputs

    def probe(self, weights: Sequence[ExpertWeights]) -> None:
        """Computes one row of zeros with each of `weights`, which any device can do. Raises what it raises.

        Raises MoietyError if the outputs are not finite.
        """
        rows = self.empty(len(weights)).zero_()
        if not self._run(rows, [1] * len(weights), weights).isfinite().all():
            raise MoietyError("the outputs are not finite, even for rows of zeros")

    def _run(self, rows: torch.Tensor, counts: Sequence[int], weights: Sequence[ExpertWeights]) -> torch.Tensor:
        outputs = grouped_expert_mlp(
            rows.to(self._device, self._dtype, non_blocking=True),
            counts,
            weights,
            self._activation,
            dtype=self._wire_dtype,
            deterministic=self._deterministic,
        ).cpu()
        if (fault := self.fault) is not None:
            outputs = fault.strike(outputs, lambda: self.fault is fault)
        return outputs
