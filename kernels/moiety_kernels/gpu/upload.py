"""From the value that an expert service holds, one `ExpertWeights` an expert, to what the kernels take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from moiety_kernels.gpu.expert_mlp import Experts
from moiety_kernels.gpu.operand import Operand, scattered
from moiety_kernels.weights import ExpertWeights


def gather_experts(counts: Sequence[int], weights: Sequence[ExpertWeights], **options: object) -> tuple[torch.Tensor, Experts]:
    """Offsets [E + 1] on the experts' device, and these experts where they lie; `options` are those of `Experts`.

    Everything the device must be told of a batch, where its rows and its weights begin, goes over in one small copy that
    the host does not wait for. The weights themselves are not moved.
    """
    bias = weights[0].gate_up_bias is not None
    gate_up = _operand([w.gate_up for w in weights], [w.gate_up_scale for w in weights], [w.gate_up_bias for w in weights])
    down = _operand([w.down for w in weights], [w.down_scale for w in weights], [w.down_bias for w in weights])
    del bias
    starts = torch.tensor([0, *counts]).cumsum(0)
    told = torch.cat((gate_up.offsets.flatten(), down.offsets.flatten(), starts))
    told = told.to(weights[0].gate_up.device, non_blocking=True)  # pageable and small: staged by the driver
    first, second, offsets = told.split((gate_up.offsets.numel(), down.offsets.numel(), starts.numel()))
    return offsets, Experts(
        replace(gate_up, offsets=first.view(4, -1)), replace(down, offsets=second.view(4, -1)), **options
    )
