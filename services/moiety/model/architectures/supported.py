"""Lists the architectures that can be served: by transformers' experts interface, an adapter or a definition.

Imports no modelling code: it searches transformers' source for modules that use its experts interface.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import SequenceMatcher
from functools import cache
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from types import MappingProxyType

from moiety.model.architectures.adapters import ADAPTERS, adapter_of
from moiety.model.architectures.definitions import DEFINITIONS

DECORATOR = "@use_experts_implementation"
# Architecture found but not served -> what it needs. A test fails if an architecture is neither served nor listed here.
_INDEXER = "layers whose attention picks its tokens by an indexer, which the router cannot run yet"
_GATE = "experts with a gate or an activation that no kernel computes"
_ATTENTION = "attention that transformers does not route through its attention interface"
REFUSED: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("deepseek_v4", "glm5_next", "qwen4_exp", "qwen4_exp_text"), _INDEXER),
        **dict.fromkeys(("beam", "inkling2", "inkling2_text"), _GATE),
        **dict.fromkeys(("deepseek_ocr2", "unlimited_ocr"), _ATTENTION),
        **dict.fromkeys(("minimax_m3_vl", "minimax_m3_vl_text"), _INDEXER),
        **dict.fromkeys(
            ("inkling_mm_model", "inkling_text"),
            "short convolutions inside attention, whose state the router does not keep",
        ),
        "qwen3_omni_moe_thinker": "the rest of a model that also generates speech: it is not published alone",
        "ernie4_5_vl_moe": "experts of two widths in one layer, one set for text and one for images",
        "muse_spark": "experts whose output is normalised before it is weighted, which no kernel computes",
        "diffusion_gemma": "block-by-block denoising of text, which the engine cannot do",
    }
)


@cache
def seam_architectures() -> frozenset[str]:
    """Returns every model_type that generates text and whose modelling code uses transformers' experts interface."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    decorated = {
        file.parent.name
        for file in models_folder().glob("*/modeling_*.py")
        if DECORATOR in file.read_text(encoding="utf-8")
    }
    generating = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    return frozenset(
        name for name in CONFIG_MAPPING_NAMES if name in generating and model_type_to_module_name(name) in decorated
    )


def models_folder() -> Path:
    """Returns the folder of transformers' modelling code, without importing transformers."""
    spec = find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "models"


def served_architectures() -> frozenset[str]:
    """Returns every model_type that can be served."""
    return (seam_architectures() | ADAPTERS.keys() | DEFINITIONS.keys()) - REFUSED.keys()


def served_through(architecture: str) -> str:
    """Returns how `architecture` is served: `seam`, `adapter` or `definition`."""
    if architecture in DEFINITIONS:
        return "definition"
    return "seam" if adapter_of(architecture).experts_class is None else "adapter"


def refusal_reason(architecture: str) -> str | None:
    """Returns why `architecture` cannot be served, and names a similar one that can; None if it is not in REFUSED."""
    if (reason := REFUSED.get(architecture)) is None:
        return None
    return f"it needs {reason}; {nearest_hint(architecture)}"


def nearest_hint(architecture: str) -> str:
    """Returns a hint for error messages: it names the supported architecture with the most similar name."""

    def similarity(name: str) -> tuple[int, float]:
        """Returns how similar `name` is to `architecture`: length of the common prefix, then similarity of the spelling."""
        common = takewhile(lambda pair: pair[0] == pair[1], zip(name, architecture, strict=False))
        return sum(1 for _ in common), SequenceMatcher(None, name, architecture).ratio()

    most_similar = max(sorted(served_architectures()), key=similarity)
    return f"the nearest supported architecture is {most_similar} (`moiety models` lists all)"
