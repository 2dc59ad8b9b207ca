"""Describes in a few words how an architecture picks its experts, from the source code of its gate."""

from __future__ import annotations

import re
from pathlib import Path

from moiety.model.architectures.definitions import DEFINITIONS
from moiety.model.architectures.supported import models_folder

_CLASS = re.compile(r"^class (\w+)\b.*?(?=^class |\Z)", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"#[^\n]*|\"\"\".*?\"\"\"", re.DOTALL)


# Not recognised from source: these gates pick by argmax, and an expert takes a limited number of a prompt's tokens.
_STATED = {"nllb-moe": "softmax, top-2 within capacity", "switch_transformers": "softmax, top-1 within capacity"}


def gating_of(architecture: str) -> str:
    """Returns how `architecture` picks experts, such as `softmax, top-k` or `sigmoid + bias, group-limited top-k`."""
    if architecture in _STATED:
        return _STATED[architecture]
    return gating(modelling_source(architecture).read_text(encoding="utf-8"))


def gating(source: str) -> str:
    """Describes what the gates in the source code `source` compute before and after topk.

    If no gate in it calls topk, returns `SparseMixer, top-2` if the code calls sparsemixer, and `unknown` otherwise.
    """
    classes = {match[1]: _COMMENT.sub("", match[0]) for match in _CLASS.finditer(source)}
    picking = {name: code for name, code in classes.items() if re.search(r"\btopk\(", code) and "ndexer" not in name}
    routers = [code for name, code in picking.items() if re.search(r"Router|Gate|Gating", name)]
    code = "\n".join(routers or [code for name, code in picking.items() if re.search(r"MoE|Moe|MLP|FFN", name)])
    if not code:
        return "SparseMixer, top-2" if "sparsemixer(" in source else "unknown"
    # Group scores use a topk of their own. The last topk picks the experts, so it decides the order of the words.
    pick = max(match.start() for match in re.finditer(r"\btopk\(", code))
    found = sorted((at, name) for name in ("sigmoid", "softmax") if (at := code.find(f"{name}(")) >= 0)
    at, score = found[0] if found else (0, "its own score")
    picked = "group-limited top-k" if re.search(r"topk_group|group_mask|num_group", code) else "top-k"
    biased = " + bias" if re.search(r"correction_bias|expert_bias|expert_biases", code) else ""
    return f"{picked}, {score}" if at > pick and not biased else f"{score}{biased}, {picked}"


def modelling_source(architecture: str) -> Path:
    """Returns the file with the gate's code: a file of transformers, or `parts.py` for an architecture of `definitions/`."""
    if architecture in DEFINITIONS:
        return Path(__file__).parent / "definitions" / "parts.py"
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    name = model_type_to_module_name(architecture)
    return models_folder() / name / f"modeling_{name}.py"
