"""Adapters for architectures that transformers' config, classes and experts interface do not serve by themselves."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from moiety.model.architectures.adapters.adapter import Adapter
from moiety.model.architectures.adapters.dbrx import Dbrx
from moiety.model.architectures.adapters.llama4 import Llama4
from moiety.model.architectures.adapters.longcat import Longcat
from moiety.model.architectures.adapters.minimax import MiniMax
from moiety.model.architectures.adapters.nllb import Nllb
from moiety.model.architectures.adapters.switch import Switch

# By model_type. A multimodal Llama 4 is `llama4`, its language model alone `llama4_text`.
ADAPTERS: Mapping[str, Adapter] = MappingProxyType(
    {
        "dbrx": Dbrx(),
        "llama4": Llama4(),
        "llama4_text": Llama4(),
        "longcat_flash": Longcat(),
        "minimax": MiniMax(),
        "nllb-moe": Nllb(),
        "switch_transformers": Switch(),
    }
)
_DEFAULT = Adapter()


def adapter_of(architecture: str) -> Adapter:
    """Returns the adapter of `architecture`, a model_type."""
    return ADAPTERS.get(architecture, _DEFAULT)
