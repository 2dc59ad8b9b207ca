"""Loads the trunk of a checkpoint: the whole language model except the routed experts' weights."""

from __future__ import annotations

import re
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from moiety.errors import CheckpointError
from moiety.model.architectures.adapters import adapter_of
from moiety.model.architectures.transformers_model import (
    causal_lm_class,
    experts_modules,
    load_config,
    quiet_transformers,
    towers,
    unsupported,
)
from moiety.model.checkpoint.checkpoint import EXPERT, Checkpoint
from moiety.model.checkpoint.quantised import QuantisedEntry
from moiety.model.checkpoint.reading import Reader
from moiety.model.experts.accounting import predicts_several_tokens
from moiety.model.experts.layout import ExpertLayout
from moiety.model.seam import IMPLEMENTATION, MOE_LAYER, register
from moiety.model.trunk.encoder_decoder import EncoderDecoder


def load_trunk(
    checkpoint: Checkpoint,
    layout: ExpertLayout,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    attention: str = "sdpa",
) -> nn.Module:
    """Loads the trunk in eval mode, without gradients; run it inside `seam.forward_context`. Reads no routed expert's tensor.

    `attention` names an attention implementation: one that transformers has for this architecture (gpt-oss has no
    `sdpa`: use `eager`), or one that the caller has registered. Raises CheckpointError if a weight is missing or does
    not have the shape that the config states.
    """
    register()
    config = load_config(checkpoint)
    trunk_class = _without_experts(causal_lm_class(checkpoint, config), layout)
    values = _dequantised(checkpoint, layout, dtype)
    with quiet_transformers():
        try:
            model, report = trunk_class.from_pretrained(
                checkpoint.path if values is None else None,
                state_dict=values,
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
    if values is None:
        _copy_mapped(model)
    model = model.to(device).requires_grad_(False).eval()
    return EncoderDecoder(model) if config.is_encoder_decoder else model


def _dequantised(checkpoint: Checkpoint, layout: ExpertLayout, dtype: torch.dtype) -> dict[str, torch.Tensor] | None:
    """Returns the trunk's tensors, dequantised; None if none is quantised, so that transformers can read the files itself.

    transformers does not heed the index where several shards hold a tensor: then they are read here, too.
    If a side of an fp8 matrix is no multiple of 128, transformers dequantises it wrongly or fails. For GPTQ and AWQ,
    transformers needs further libraries.
    """
    expert_tensors = {
        name.replace(EXPERT, str(expert))
        for layer in layout.layers
        for names in layer.sources.values()
        for name in names
        for expert in range(layout.shape.experts if EXPERT in name else 1)
    }
    trunk_tensors = {
        name: entry
        for name, entry in checkpoint.tensors.items()
        if name not in expert_tensors and not predicts_several_tokens(checkpoint, name)
    }
    quantised = any(isinstance(entry, QuantisedEntry) for entry in trunk_tensors.values())
    if not quantised and checkpoint.repeated.isdisjoint(trunk_tensors):
        return None
    with Reader() as reader:
        return reader.state(trunk_tensors, dtype)


def _without_experts(model_class: Any, layout: ExpertLayout) -> Any:
    """Returns a subclass of `model_class` whose `__init__` removes the routed experts' weights and the towers."""

    def __init__(self: Any, *arguments: Any, **options: Any) -> None:
        model_class.__init__(self, *arguments, **options)
        modules = experts_modules(self)
        if [path for path, _ in modules] != [layer.module for layer in layout.layers]:
            raise RuntimeError("the expert layout belongs to another model")
        for ordinal, (path, module) in enumerate(modules):
            for part in module.modules():
                part._parameters.clear()
                part._is_hf_initialized = True  # type: ignore[assignment]  # or weight initialisation looks for the parameters
            MOE_LAYER.set(module, ordinal)
            block = self.get_submodule(path.rpartition(".")[0])
            # Some blocks initialise the experts' weights; `load_trunk` refuses missing weights.
            block._is_hf_initialized = True
            adapter_of(self.config.model_type).patch(block, module)
        unread = {rf"^{re.escape(layer.module)}\." for layer in layout.layers}
        for path in towers(self):
            parent, _, name = path.rpartition(".")
            self.get_submodule(parent).register_module(name, None)
            unread.add(rf"^{re.escape(path)}\.")
        self._keys_to_ignore_on_load_unexpected = {*(self._keys_to_ignore_on_load_unexpected or ()), *unread}

    attributes = {
        "__init__": __init__,
        "__module__": model_class.__module__,  # otherwise transformers skips conversions, as for custom code
    }
    return type(model_class.__name__, (model_class,), attributes)


def _copy_mapped(model: nn.Module) -> None:
    """Copies tensors that transformers left as views of mapped files: replacing a file must not change a live model."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
