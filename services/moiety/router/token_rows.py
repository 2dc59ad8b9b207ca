"""Arguments of a module by tokens: which of them have one row for each token of a packed step, and parts of those."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def tokenwise(value: Any, shape: tuple[int, int], change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`value` with every tensor in it changed that begins with `shape`, one row a token."""
    if isinstance(value, torch.Tensor):
        return change(value) if value.shape[:2] == shape else value
    if isinstance(value, tuple | list):
        return type(value)(tokenwise(item, shape, change) for item in value)
    if isinstance(value, dict):
        return {name: tokenwise(item, shape, change) for name, item in value.items()}
    return value


def cut(value: Any, shape: tuple[int, int], begin: int, end: int) -> Any:
    """The tokens from `begin` to `end` of every sequence."""
    return tokenwise(value, shape, lambda tensor: tensor[:, begin:end])
