"""What transformers knows of a checkpoint: its config class, its causal-LM class and where its routed experts are.

Only functions import transformers: it costs 4.5 s and 170 MiB, and an expert replica must start without it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from moiety.errors import CheckpointError
from moiety.model.architectures.adapters import adapter_of, dbrx, longcat, nllb, switch
from moiety.model.architectures.adapters.protocol import RoutedExperts
from moiety.model.architectures.definitions import definition_of
from moiety.model.architectures.recognise import recognise
from moiety.model.architectures.supported import nearest, refused
from moiety.model.checkpoint.checkpoint import Checkpoint


def _check_window(config: Any) -> None:
    """MiniMax calls its layers full attention and, where a window is set, has them see no further: never published."""
    if config.sliding_window is not None:
        raise ValueError(f"sliding_window {config.sliding_window}: windows in its full attention are not supported")


_AMENDMENTS: Mapping[str, Callable[[Any], None]] = {
    "dbrx": dbrx.amend,
    "minimax": _check_window,
    "nllb-moe": nllb.amend,
    "switch_transformers": switch.amend,
}


def load_config(checkpoint: Checkpoint) -> Any:
    """The transformers config; code shipped inside a checkpoint is never run. Raises CheckpointError where unknown."""
    from transformers import AutoConfig

    if refusal := refused(checkpoint.architecture):
        raise unsupported(checkpoint, refusal)
    defined = definition_of(checkpoint.architecture)
    reader = AutoConfig if defined is None else defined.config_class
    try:
        config = reader.from_pretrained(checkpoint.path, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, OSError) as error:
        told = f"transformers cannot read its config: {_first_line(error)}; {nearest(checkpoint.architecture)}"
        raise unsupported(checkpoint, told) from error
    for name in ("quantization_config", "compression_config"):  # weights are dequantised here, not by transformers
        if hasattr(config, name):
            delattr(config, name)
    if (amend := _AMENDMENTS.get(config.model_type)) is not None:
        try:
            amend(config)
        except ValueError as error:
            raise unsupported(checkpoint, str(error)) from error
    text = config.sub_configs.get("text_config")
    found = text_class(config)
    # A multimodal architecture whose language model is a class of its own: that is all of it that is served.
    return config.text_config if found is not None and text is not None and found.config_class is text else config


def causal_lm_class(checkpoint: Checkpoint, config: Any) -> type[nn.Module]:
    """The class that transformers would generate text with; raises CheckpointError where there is none."""
    found = text_class(config)
    if found is None:
        told = f"transformers has no class that generates text for it; {nearest(checkpoint.architecture)}"
        raise unsupported(checkpoint, told)
    return found


def text_class(config: Any) -> Any:
    """The class that generates text from `config`, of transformers or ours; None where there is none."""
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
    return longcat.as_published(found) if config.model_type == "longcat_flash" else found


def meta_model(model_class: type[nn.Module], config: Any) -> nn.Module:
    """A model of `config` whose tensors have shapes and no storage."""
    with torch.device("meta"):
        return model_class(copy.deepcopy(config))


def experts_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, module) of each MoE layer's routed experts, in layer order: behind transformers' seam, or with an adapter.

    The layers of an encoder come before those of its decoder.
    """
    apart = tuple(f"{path}." for path in towers(model))  # a tower may have experts of its own
    return [
        (path, module)
        for path, module in model.named_modules()
        if (_behind_the_seam(type(module)) or adapter_of(type(module)) is not None) and not path.startswith(apart)
    ]


def routed_experts(module: nn.Module) -> RoutedExperts:
    """What one of `experts_modules` is made of. Raises ValueError where no kernel computes it."""
    adapter = adapter_of(type(module))
    return recognise(module) if adapter is None else adapter.recognise(module)


def towers(model: nn.Module) -> list[str]:
    """Paths of what a multimodal model reads images, video or sound with: submodels whose config is not the text's."""
    config: Any = model.config
    others = {
        part for name, part in (config.sub_configs or {}).items() if name != "text_config" and name.endswith("_config")
    }
    found = [path for path, module in model.named_modules() if path and type(getattr(module, "config", None)) in others]
    return [path for path in found if not any(path.startswith(f"{other}.") for other in found)]


def unsupported(checkpoint: Checkpoint, reason: str) -> CheckpointError:
    """The error for a checkpoint that is sound, but not one that can be served."""
    return CheckpointError(f"checkpoint {checkpoint.path} (architecture {checkpoint.architecture}): {reason}")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and load reports: a service's log is not a terminal."""
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


def _behind_the_seam(module_class: type[nn.Module]) -> bool:
    # `use_experts_implementation` leaves no mark but its closure; the registry it closes over is the seam itself.
    code = getattr(module_class.forward, "__code__", None)
    return code is not None and "experts_interface" in code.co_freevars


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
