"""Finds a checkpoint's config class, its causal-LM class and its routed experts in transformers.

transformers is imported only inside functions, because the import takes 4.5 s and 170 MiB. An expert replica whose
expert layout is cached (`model/experts/cached.py`) starts without this import.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from moiety.errors import CheckpointError
from moiety.model.architectures.adapters import adapter_of
from moiety.model.architectures.definitions import definition_of
from moiety.model.architectures.refused_values import refused_values, unknown_architecture
from moiety.model.architectures.supported import nearest_hint, refusal_reason
from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.checkpoint.rope_fields import check_served
from moiety.model.checkpoint.side_files import CONFIG_FILE, text_config


def load_config(checkpoint: Checkpoint) -> Any:
    """Loads the checkpoint's config for transformers, without running code shipped in the checkpoint.

    Raises CheckpointError if the architecture is unknown or unsupported.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    file = checkpoint.path / CONFIG_FILE
    if checkpoint.config.get("model_type") is None:
        raise CheckpointError(f"{file}: model_type is missing: must name an architecture")
    if refusal := refusal_reason(checkpoint.architecture):
        raise unsupported(checkpoint, refusal)
    defined = definition_of(checkpoint.architecture)
    if defined is None and checkpoint.architecture not in CONFIG_MAPPING:
        raise unknown_architecture(file, checkpoint.config)
    reader = AutoConfig if defined is None else defined.config_class
    try:
        config = reader.from_pretrained(checkpoint.path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its parsers raise
        raise refused_values(file, checkpoint.config, error, "cannot read it") from error
    for part in (config, config.get_text_config()):
        for name in ("quantization_config", "compression_config"):  # Moiety dequantises the weights, not transformers
            if hasattr(part, name):
                delattr(part, name)
    try:
        adapter_of(config.model_type).amend(config)
    except ValueError as error:
        raise unsupported(checkpoint, str(error)) from error
    within = "rope_scaling." if text_config(checkpoint.config).get("rope_scaling") else "rope_parameters."
    for rope in rope_parameters(config):
        check_served(file, rope, within, partial(_rotating_pairs, config.get_text_config(), rope))
    text = config.sub_configs.get("text_config")
    found = text_class(config)
    # If a multimodal architecture's language model has its own class, only the language model is served.
    return config.text_config if found is not None and text is not None and found.config_class is text else config


def causal_lm_class(checkpoint: Checkpoint, config: Any) -> type[nn.Module]:
    """Returns the class that generates text from `checkpoint`; raises CheckpointError if no such class exists."""
    found = text_class(config)
    if found is None:
        reason = f"transformers has no class that generates text for it; {nearest_hint(checkpoint.architecture)}"
        raise unsupported(checkpoint, reason)
    return found


def text_class(config: Any) -> Any:
    """Returns the class of `definitions/` or transformers that generates text with `config`; None if neither has one."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    )

    if (defined := definition_of(config.model_type)) is not None:
        return defined
    if config.is_encoder_decoder:
        found = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING.get(type(config), None)
    else:
        found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        found = found or MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    found = found[0] if isinstance(found, tuple | list) else found
    return found and adapter_of(config.model_type).published_class(found)


def checkpoint_model(checkpoint: Checkpoint, config: Any) -> nn.Module:
    """Builds the model that generates text from `checkpoint` on `meta`.

    Raises CheckpointError if transformers has no class for it, or if no model can be built of the config's values.
    """
    model_class = causal_lm_class(checkpoint, config)
    try:
        return meta_model(model_class, config)
    except Exception as error:  # whatever a model's constructor does with a value that it does not expect
        file, doing = checkpoint.path / CONFIG_FILE, f"cannot build {model_class.__name__} with its values"
        raise refused_values(file, checkpoint.config, error, doing) from error


def meta_model(model_class: type[nn.Module], config: Any) -> nn.Module:
    """Builds a model of `config` whose tensors have shapes but no storage."""
    with torch.device("meta"):
        return model_class(copy.deepcopy(config))


def experts_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Returns (path, module) of each MoE layer's routed experts, in layer order; an encoder's layers come first.

    Leaves out experts inside towers.
    """
    config: Any = model.config
    adapter = adapter_of(config.model_type)
    tower_prefixes = tuple(f"{path}." for path in towers(model))  # a tower may have experts of its own
    return [
        (path, module)
        for path, module in model.named_modules()
        if adapter.holds_experts(module) and not path.startswith(tower_prefixes)
    ]


def towers(model: nn.Module) -> list[str]:
    """Returns the paths of a multimodal model's towers (image, video, sound): submodels whose config is not the text config."""
    config: Any = model.config
    others = {
        part for name, part in (config.sub_configs or {}).items() if name != "text_config" and name.endswith("_config")
    }
    found = [path for path, module in model.named_modules() if path and type(getattr(module, "config", None)) in others]
    return [path for path in found if not any(path.startswith(f"{other}.") for other in found)]


def rope_parameters(config: Any) -> list[dict[str, Any]]:
    """Returns the parameters of rotary positions of a config for transformers: one set, or one for each kind of layer."""
    found = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = list(found.values())
    return kinds if kinds and all(isinstance(kind, dict) for kind in kinds) else [found]


def _rotating_pairs(text: Any, rope: Mapping[str, Any]) -> int | None:
    """Returns the number of pairs of elements that rotate in a head, as transformers computes it; None if heads differ."""
    if text.is_heterogeneous:
        return None
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return (int(width * rope.get("partial_rotary_factor", 1.0)) + 1) // 2


def unsupported(checkpoint: Checkpoint, reason: str) -> CheckpointError:
    """Returns the error for a checkpoint that is intact but cannot be served."""
    return CheckpointError(f"checkpoint {checkpoint.path} (architecture {checkpoint.architecture}): {reason}")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Turns off transformers' progress bars and load reports, which would clutter a service's log."""
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
