"""What a config states of a model's shape: which field counts, and what is said where the file states none."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from moiety.errors import CheckpointError
from moiety.model.architectures.supported import nearest_hint, served_architectures
from moiety.model.architectures.transformers_model import unsupported
from moiety.model.checkpoint.bounds import MAX_COUNT
from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.checkpoint.reading import FLOATS
from moiety.model.checkpoint.side_files import CONFIG_FILE, CONTEXT_NAMES, text_config, warn

DTYPES = {stored: str(dtype).removeprefix("torch.") for stored, dtype in FLOATS.items()}
OF_EXPERTS = re.compile(r"(^|\.)(\w+_)?experts?\.")  # in a tensor's name
TOP_K_NAMES = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_k",
    "moe_top_k",
    "top_k",
)


def without_experts(checkpoint: Checkpoint, config: Any, model: str) -> CheckpointError:
    """Returns the error for a checkpoint whose class in transformers, `model`, has no layer with experts.

    It is a dense model, unless its weights have experts or its config counts some: then its config is another model's, or its
    architecture keeps its experts where Moiety does not look. Some architectures, such as Granite-hybrid, have both.
    """
    file, architecture = checkpoint.path / CONFIG_FILE, checkpoint.architecture
    held = next((name for name in checkpoint.tensors if OF_EXPERTS.search(name)), None)
    counted = _counts_experts(config)
    if architecture in served_architectures() and (held is not None or counted):
        return CheckpointError(
            f"{file}: its values leave no layer with experts to {architecture}: copy the file from its publisher again"
        )
    if held is not None:
        reason = (
            f"{model} has no layer with experts that Moiety can spread, but the weights have experts, such as {held}"
        )
        return CheckpointError(
            f"{file}: model_type = {architecture!r}: {reason}: copy the file from the publisher of the weights; "
            "`moiety models` lists what can be served"
        )
    if counted:
        reason = "it has no MoE layer that transformers routes through its experts interface, and no adapter"
        return unsupported(checkpoint, f"{reason}; {nearest_hint(architecture)}")
    kind = f"{model} is a dense model, without experts to spread"
    return unsupported(checkpoint, f"{kind}: serve it with another engine, such as vLLM or llama.cpp")


def _counts_experts(config: Any) -> bool:
    """Returns whether a config counts experts."""
    counts = (value for name, value in config.get_text_config().to_dict().items() if name.endswith("experts"))
    return any(isinstance(count, list) or (isinstance(count, int) and count > 1) for count in counts)


def longest_text(checkpoint: Checkpoint, config: Any) -> int:
    """Returns the longest text by the config's own length; warns if the file states none."""
    context = setting(checkpoint, config, CONTEXT_NAMES)
    if not any(name in part for part in (text_config(checkpoint.config), checkpoint.config) for name in CONTEXT_NAMES):
        warn(
            f"{checkpoint.path / CONFIG_FILE}: states no {CONTEXT_NAMES[0]}: {context}, transformers' default, is taken"
        )
    return context


def computed_dtype(checkpoint: Checkpoint, config: Any, stored: str | None) -> str:
    """Returns the dtype that a model computes in: that in which its experts are `stored`, whatever its config states.

    A quantised model computes in the dtype that its config states, or in bfloat16 if that names none.
    """
    stated = str(getattr(config, "dtype", None)).removeprefix("torch.")
    if stored is None:
        return stated if stated in DTYPES.values() else "bfloat16"
    if stated in DTYPES.values() and stated != stored:
        warn(
            f"checkpoint {checkpoint.path}: its experts are stored in {stored}, but {CONFIG_FILE} states {stated}: "
            f"{stored} is served, unless the setting dtype says otherwise"
        )
    return stored


def setting(checkpoint: Checkpoint, config: Any, names: Sequence[str], most: int = MAX_COUNT) -> int:
    """Returns the first integer that the config has under one of `names`.

    transformers gives its class's default where the file states none. Raises CheckpointError if there is none, or if it is
    below 1 or above `most`.
    """
    for name in names:
        if isinstance(value := getattr(config, name, None), int):
            if not 1 <= value <= most:
                bound = f"must be an integer from 1 to {most}"
                raise CheckpointError(f"{checkpoint.path / CONFIG_FILE}: {name} = {value}: {bound}")
            return value
    raise unsupported(checkpoint, f"its config has none of {', '.join(names)}")
