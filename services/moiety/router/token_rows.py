"""Changes or cuts those arguments of a module that have one row for each token of a packed step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def map_token_rows(value: Any, shape: tuple[int, int], change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Returns `value` with `change` applied to each tensor in it whose shape begins with `shape`, one row per token."""
    if isinstance(value, torch.Tensor):
        return change(value) if value.shape[:2] == shape else value
    if isinstance(value, tuple | list):
        return type(value)(map_token_rows(item, shape, change) for item in value)
    if isinstance(value, dict):
        return {name: map_token_rows(item, shape, change) for name, item in value.items()}
    return value


def slice_tokens(value: Any, shape: tuple[int, int], begin: int, end: int) -> Any:
    """Returns `value` with tensors whose shape begins with `shape` cut to `[:, begin:end]`, tokens of each sequence."""
    return map_token_rows(value, shape, lambda tensor: tensor[:, begin:end])
