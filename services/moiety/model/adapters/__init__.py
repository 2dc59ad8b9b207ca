"""MoE blocks that transformers does not run through its experts interface: one small adapter each.

An adapter knows how such a block's experts are built, and gives the block a forward that sends their rows to a backend.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from torch import nn

from moiety.model.adapters.listed import Adapter
from moiety.model.adapters.nllb import NLLB
from moiety.model.adapters.switch import SWITCH

ADAPTERS: Mapping[str, Adapter] = MappingProxyType({adapter.experts_class: adapter for adapter in (SWITCH, NLLB)})


def adapter_of(experts: nn.Module) -> Adapter | None:
    """The adapter for a module of routed experts, by the name of its class; None for any other module."""
    return ADAPTERS.get(type(experts).__name__)
