"""Accounts for every tensor of a checkpoint: the model reads it, it is unused on purpose, or the checkpoint is refused.

A tensor that nothing reads may be the scale, zero point or bias of a weight. The model would run without it and give wrong
answers. Only names, shapes and dtypes count; values are read of unexpected biases, which may be zeros.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from moiety.model.architectures.transformers_model import towers, unsupported
from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.checkpoint.headers import TensorEntry
from moiety.model.checkpoint.quantised import Stored
from moiety.model.checkpoint.reading import FLOATS, Reader
from moiety.model.checkpoint.side_files import AUTOAWQ_FILE, AUTOGPTQ_FILE, CONFIG_FILE, MODELOPT_FILE
from moiety.model.experts.config_values import OF_EXPERTS
from moiety.model.experts.unread import UNUSED, predicts_several_tokens

_PLAIN = {*FLOATS, "F64"}  # dtypes of weights that are not quantised


def check_tensors(checkpoint: Checkpoint, model: Any, sources: Mapping[str, Mapping[Any, Sequence[str]]]) -> None:
    """Raises CheckpointError for a tensor that would be misread, or that nothing reads and nothing lists.

    `model` is on `meta`. `sources` has, for each name in the model, the published tensors that become it.
    """
    state = model.state_dict()
    known = (name for name in model._keys_to_ignore_on_load_unexpected or () if not _names_a_layer_of(model, name))
    unused = re.compile("|".join((*UNUSED, *known)))
    tower_prefixes = tuple(f"{path}." for path in towers(model))
    targets = {
        name: target
        for target, by_pattern in sources.items()
        if not target.startswith(tower_prefixes)
        for names in by_pattern.values()
        for name in names
    }
    for name, target in targets.items():
        entry = checkpoint.tensor(name)
        if target in state:
            if state[target].is_floating_point() and isinstance(entry, TensorEntry) and entry.dtype not in _PLAIN:
                raise unsupported(checkpoint, f"{name} is {entry.dtype}, but {_stated(checkpoint)}")
        elif not (unused.search(name) or predicts_several_tokens(checkpoint, name) or _is_zero_bias(name, entry)):
            module = name.rpartition(".")[0]
            siblings = (other for other, place in targets.items() if place in state)
            owner = next((other for other in siblings if other.rpartition(".")[0] == module), None)
            stored = f"{name} ({entry.dtype} {list(entry.shape)})"
            if owner is not None:
                raise unsupported(
                    checkpoint,
                    f"{stored} belongs to {owner} ({checkpoint.tensor(owner).dtype}), but {_stated(checkpoint)}",
                )
            reason = f"{stored} becomes no weight of the model, and {_stated(checkpoint)}"
            remedy = "if the model is the same without it, remove it"
            if OF_EXPERTS.search(name):
                remedy = f"if {CONFIG_FILE} is not that of these weights, copy it from their publisher"
            raise unsupported(checkpoint, f"{reason}; {remedy}")


def _names_a_layer_of(model: Any, pattern: str) -> bool:
    """Returns whether a pattern of transformers, meant for the last layer of one published model, names a layer of this one."""
    number = re.search(r"layers\\?\.(\d+)", pattern)
    return number is not None and int(number[1]) < model.config.get_text_config().num_hidden_layers


def _is_zero_bias(name: str, entry: Stored) -> bool:
    """Returns whether `name` is a bias of zeros: AutoGPTQ wrote one for every matrix, even if the model has none."""
    if not name.endswith(".bias") or not isinstance(entry, TensorEntry):
        return False
    with Reader() as reader:
        return not reader.tensor(entry).any()


def _stated(checkpoint: Checkpoint) -> str:
    """Returns what the checkpoint states about quantisation, for a tensor that it does not explain."""
    if not checkpoint.quantization:
        return f"none of {CONFIG_FILE}, {MODELOPT_FILE}, {AUTOGPTQ_FILE} and {AUTOAWQ_FILE} says how it is quantised"
    return f"the stated quantisation ({checkpoint.quantization.get('quant_method')}) has no such tensor"
