"""Keys and values of running sequences, bounded by one memory setting.

A sequence owns one contiguous buffer per layer, reserved on admission for all the tokens it may come to, so a running
request never runs out. Nothing here knows which tokens are valid: the engine does, and commits at the end of a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What one attention layer keeps of a token. K and V may differ in width."""

    heads: int
    key_width: int
    value_width: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        return self.heads * (self.key_width + self.value_width) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """Layer index -> what it keeps."""

    layers: Mapping[int, LayerSpec]

    @property
    def bytes_per_token(self) -> int:
        return sum(layer.bytes_per_token for layer in self.layers.values())


class KVCache:
    """Buffers for sequences, by request id, within `memory_bytes` in all."""

    def __init__(self, spec: CacheSpec, memory_bytes: int, device: torch.device):
        self.spec, self._device = spec, device
        self.capacity = memory_bytes // max(1, spec.bytes_per_token)  # tokens
        self._reserved: dict[str, int] = {}
        self._buffers: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def free(self) -> int:
        """Tokens that can still be reserved."""
        return self.capacity - sum(self._reserved.values())

    def reserve(self, request_id: str, tokens: int) -> bool:
        """Whether there was room for `tokens`; if so they are the request's until `release`."""
        if tokens > self.free:
            return False
        buffers = {}
        for index, layer in self.spec.layers.items():
            # Uninitialised, so on a CPU the kernel hands out pages only as they are written.
            key = torch.empty(layer.heads, tokens, layer.key_width, dtype=layer.dtype, device=self._device)
            value = torch.empty(layer.heads, tokens, layer.value_width, dtype=layer.dtype, device=self._device)
            buffers[request_id, index] = key, value
        self._reserved[request_id] = tokens
        self._buffers.update(buffers)
        return True

    def release(self, request_id: str) -> None:
        self._reserved.pop(request_id, None)
        for index in self.spec.layers:
            self._buffers.pop((request_id, index), None)

    def extend(
        self, request_id: str, layer: int, past: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes key [H, n, Dk] and value [H, n, Dv] behind `past` tokens; returns both up to there, [H, past + n, D].

        Writing the same positions again is harmless: a step that failed is simply run again.
        """
        keys, values = self._buffers[request_id, layer]
        end = past + key.shape[1]
        keys[:, past:end] = key
        values[:, past:end] = value
        return keys[:, :end], values[:, :end]
