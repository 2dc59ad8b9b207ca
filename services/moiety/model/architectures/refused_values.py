"""Says in words which values of a config transformers cannot use: which field, what it holds and what it must hold.

transformers refuses some of them by name, and fails on others in the middle of a computation. So the fields are searched for
what the failure names: a key that it lacks, a zero that it divides by, a negative size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moiety.core.text import did_you_mean
from moiety.errors import CheckpointError, shown
from moiety.model.architectures.supported import served_architectures
from moiety.model.checkpoint.files import AGAIN
from moiety.model.checkpoint.side_files import text_config

_FIELD = re.compile(r"Field '(?P<name>\w+)(\[\d+\])*' expected (?P<kind>.+?), got ")
_ITEM = re.compile(r"Invalid (item|key).* in \w+ '(?P<name>\w+)'")
_WHERE = re.compile(r"^(Class validation|Validation) error for (validator|field) '\w+': (\w+: )?")
_OF_ROPE = re.compile(r"`rope_parameters`'s (?P<name>\w+) field must be (?P<kind>.+), got (?P<value>.+)")
_KINDS = {
    "int": "an integer",
    "float": "a number with a decimal point",
    "str": "a string",
    "bool": "true or false",
    "a dict": "a JSON object",
    "NoneType": "null",
}
_REFUSALS = (
    ("even rotary dimension", "head_dim", "must be even, since elements rotate in pairs"),
    ("adding_idx", "pad_token_id", "must be below vocab_size"),
)
_NO_SIZE = re.compile(r"_ids?$|dropout")

# By its name, how an error calls a field, and its value.
_Stated = Mapping[str, tuple[str, Any]]


def unknown_architecture(file: Path, config: Mapping[str, Any]) -> CheckpointError:
    """Returns the error for a config whose model_type neither transformers nor Moiety has."""
    stated = config["model_type"]
    own = "; it may be in code that the checkpoint brings, which Moiety does not run" if config.get("auto_map") else ""
    near = did_you_mean(str(stated), served_architectures())
    reason = f"no architecture of Moiety or of transformers {version('transformers')}"
    return CheckpointError(
        f"{file}: model_type = {shown(stated)}: {reason}{own}{near} (`moiety models` lists what can be served)"
    )


def refused_values(file: Path, config: Mapping[str, Any], error: Exception, doing: str) -> CheckpointError:
    """Returns the error for a config whose values made transformers raise `error`. `doing`: what it cannot do then."""
    stated = {name: (name, value) for name, value in config.items()}
    if (text := text_config(config)) is not config:
        stated |= {name: (f"text_config.{name}", value) for name, value in text.items()}
    says = _WHERE.sub("", " ".join(str(error).split()))
    for explain in (_wrong_type, _layer_types, _unknown_name, _size, _named):
        if (sentence := explain(stated, error, says)) is not None:
            return CheckpointError(f"{file}: {sentence}" + ("" if sentence.endswith("?") else f": {AGAIN}"))
    return CheckpointError(f"{file}: transformers {version('transformers')} {doing} ({says[:200]}): {AGAIN}")


def _field(stated: _Stated, name: str) -> str:
    full, value = stated.get(name, (name, None))
    return f"{full} = {shown(value)}"


def _wrong_type(stated: _Stated, error: Exception, says: str) -> str | None:
    """Explains how transformers refuses the type of a field, or of an item of it."""
    if item := _ITEM.search(says):
        return f"{_field(stated, item['name'])}: holds an item of a wrong type"
    if rope := _OF_ROPE.search(says):
        return f"rope_parameters.{rope['name']} = {rope['value']}: must be {rope['kind']}"
    if found := list(_FIELD.finditer(says)):
        kinds = dict.fromkeys(_KINDS.get(field["kind"], field["kind"]) for field in found)
        return f"{_field(stated, found[0]['name'])}: must be {' or '.join(kinds)}"
    return None


def _layer_types(stated: _Stated, error: Exception, says: str) -> str | None:
    """Explains kinds of layers that transformers does not know, or of which there are too few or too many."""
    from transformers.configuration_utils import ALLOWED_LAYER_TYPES

    if "layer_types" not in says or "layer_types" not in stated:
        return None
    name, kinds = stated["layer_types"]
    if not isinstance(kinds, list):
        return f"{name} = {shown(kinds)}: must be a list with the kind of each layer"
    for place, kind in enumerate(kinds):
        if kind not in ALLOWED_LAYER_TYPES:
            known = f"must be one of {', '.join(ALLOWED_LAYER_TYPES)}"
            return f"{name}[{place}] = {shown(kind)}: {known}{did_you_mean(str(kind), ALLOWED_LAYER_TYPES)}"
    return f"{name} has {len(kinds)} entries: must have one for each layer, and {_field(stated, 'num_hidden_layers')}"


def _unknown_name(stated: _Stated, error: Exception, says: str) -> str | None:
    """Explains a value that transformers looks up and does not have, or a field that it needs."""
    from transformers.activations import ACT2FN

    if not isinstance(error, KeyError):
        return None
    key = error.args[0]
    for name, (full, value) in stated.items():
        if value == key:
            known = sorted(ACT2FN) if "act" in name else []
            must = f"must be one of {', '.join(known)}{did_you_mean(str(key), known)}" if known else "is not known"
            return f"{full} = {shown(value)}: {must}"
    return f"{key} is missing" if isinstance(key, str) and key.isidentifier() else None


def _size(stated: _Stated, error: Exception, says: str) -> str | None:
    """Explains a size of zero that something is divided by, and a negative size."""
    if isinstance(error, ZeroDivisionError):
        low, high = 0, 0
    elif "negative dimension" in says:
        low, high = -(1 << 63), -1
    else:
        return None
    suspects = [
        f"{full} = {value}"
        for name, (full, value) in stated.items()
        if type(value) is int and low <= value <= high and not _NO_SIZE.search(name)
    ]
    if not suspects:
        return None
    return f"{', '.join(suspects)}: {'must' if len(suspects) == 1 else 'one of them must'} be at least 1"


def _named(stated: _Stated, error: Exception, says: str) -> str | None:
    """Explains refusals that name one field, by words that only they have."""
    for words, name, must in _REFUSALS:
        if words in says and name in stated:
            return f"{_field(stated, name)}: {must}"
    return None
