"""Loads the router's part of a checkpoint: the whole language model except the routed experts' weights."""

from __future__ import annotations

import re
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from moiety.errors import CheckpointError
from moiety.model.adapters import adapter_of
from moiety.model.architecture import (
    causal_lm_class,
    experts_modules,
    load_config,
    quiet_transformers,
    towers,
    unsupported,
)
from moiety.model.checkpoint import Checkpoint
from moiety.model.encoderdecoder import EncoderDecoder
from moiety.model.layout import ExpertLayout
from moiety.model.seam import IMPLEMENTATION, LAYER_ATTRIBUTE, register


def load_router(
    checkpoint: Checkpoint,
    layout: ExpertLayout,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    attention: str = "sdpa",
) -> nn.Module:
    """The model in eval mode, without gradients; run it inside `seam.use_backend`. No expert tensor is read.

    `attention` is a name that transformers knows for this architecture (gpt-oss has no `sdpa`: use `eager`), or one
    that the caller has registered. Raises CheckpointError where a weight is missing or of another shape than promised.
    """
    register()
    config = load_config(checkpoint)
    router_class = _without_experts(causal_lm_class(checkpoint, config), layout)
    with quiet_transformers():
        try:
            model, report = router_class.from_pretrained(
                checkpoint.path,
                config=config,
                dtype=dtype,
                attn_implementation=attention,
                experts_implementation=IMPLEMENTATION,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
        except (RuntimeError, ValueError, ImportError, OSError, SafetensorError) as error:
            raise unsupported(checkpoint, f"transformers cannot load it: {error}") from error
    for kind in ("missing_keys", "mismatched_keys"):
        if bad := sorted(map(str, report[kind])):
            raise CheckpointError(f"checkpoint {checkpoint.path}: {kind.replace('_', ' ')}: {', '.join(bad[:8])}")
    model = _owned(model).to(device).requires_grad_(False).eval()
    return EncoderDecoder(model) if config.is_encoder_decoder else model


def _without_experts(model_class: Any, layout: ExpertLayout) -> Any:
    """A subclass without expert weights and towers: they go as soon as they exist, which is while they are on meta."""

    def __init__(self: Any, *arguments: Any, **options: Any) -> None:
        model_class.__init__(self, *arguments, **options)
        modules = experts_modules(self)
        if [path for path, _ in modules] != [layer.module for layer in layout.layers]:
            raise RuntimeError("the expert layout belongs to another model")
        for ordinal, (path, module) in enumerate(modules):
            for part in module.modules():
                part._parameters.clear()
                part._is_hf_initialized = True  # type: ignore[assignment]  # or weight initialisation looks for them
            setattr(module, LAYER_ATTRIBUTE, ordinal)
            if (adapter := adapter_of(type(module))) is not None:
                adapter.install(self.get_submodule(path.rpartition(".")[0]), module)
        unread = {rf"^{re.escape(layer.module)}\." for layer in layout.layers}
        for path in towers(self):
            parent, _, name = path.rpartition(".")
            self.get_submodule(parent).register_module(name, None)
            unread.add(rf"^{re.escape(path)}\.")
        self._keys_to_ignore_on_load_unexpected = {*(self._keys_to_ignore_on_load_unexpected or ()), *unread}

    attributes = {
        "__init__": __init__,
        "__module__": model_class.__module__,  # elsewhere transformers takes it for custom code and skips conversions
    }
    return type(model_class.__name__, (model_class,), attributes)


def _owned(model: nn.Module) -> nn.Module:
    """Copies what transformers left as views of mapped files: replacing a file must not change a live model."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model
