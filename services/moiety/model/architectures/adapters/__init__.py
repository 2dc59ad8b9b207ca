"""Adapters for routed experts that transformers computes outside its experts interface: one adapter per experts class."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from moiety.model.architectures.adapters.dbrx import Dbrx
from moiety.model.architectures.adapters.llama4 import Llama4
from moiety.model.architectures.adapters.longcat import Longcat
from moiety.model.architectures.adapters.nllb import Nllb
from moiety.model.architectures.adapters.protocol import Adapter
from moiety.model.architectures.adapters.switch import Switch

ADAPTERS: Mapping[str, Adapter] = MappingProxyType(
    {
        "DbrxExperts": Dbrx(),
        "Llama4TextExperts": Llama4(),
        "LongcatFlashExperts": Longcat(),
        "NllbMoeExperts": Nllb(),
        "SwitchTransformersExperts": Switch(),
    }
)


def adapter_of(module_class: type[Any]) -> Adapter | None:
    """Returns the adapter for the experts class `module_class`; None if none serves the class."""
    from_transformers = module_class.__module__.startswith("transformers.models.")
    return ADAPTERS.get(module_class.__name__) if from_transformers else None
