"""Sizes at which a step of training takes milliseconds."""

from __future__ import annotations

from moiety.training.model import Sizes

SMALL = Sizes(hidden=32, layers=2, heads=2, kv_heads=1, head_dim=16, experts=4, expert_width=16, context=64)
