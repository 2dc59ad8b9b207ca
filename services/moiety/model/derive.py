"""Derives an expert layout from transformers: no table of architectures, only the experts seam and its conversions.

The model is built on `meta`; each checkpoint tensor is renamed as `from_pretrained` would, and those that end in an
experts module become that layer's sources. Nothing is read but names and shapes.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from moiety.core import ExpertMLP, ModelShape
from moiety.errors import CheckpointError
from moiety.model.adapters import Adapter, adapter_of
from moiety.model.architecture import causal_lm_class, experts_modules, load_config, meta_model, unsupported
from moiety.model.checkpoint import Checkpoint
from moiety.model.layout import EXPERT, ExpertLayout, LayerLayout
from moiety.model.probe import expert_mlp_of, parameters_of, probed

DTYPES: Mapping[str, str] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
TOP_K_NAMES = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_k",
    "moe_top_k",
    "top_k",
)
CONTEXT_NAMES = ("max_position_embeddings", "model_max_length", "max_seq_len", "n_positions")
# Of models that know distances only, and state no bound: the length that they were trained with.
_RELATIVE: Mapping[str, int] = {"switch_transformers": 512}

_Sources = dict[str, dict[str | None, list[str]]]  # model parameter -> conversion pattern (None: as it is) -> tensors


def derive_layout(checkpoint: Checkpoint) -> ExpertLayout:
    """The layout of `checkpoint`; raises CheckpointError naming the architecture and what is missing."""
    config = load_config(checkpoint)
    model = meta_model(causal_lm_class(checkpoint, config), config)
    modules = experts_modules(model)
    if not modules:
        raise unsupported(checkpoint, "it has no MoE layer that transformers routes through its experts interface")
    try:
        mlps = {_mlp_of(model, path, module) for path, module in modules}
    except ValueError as error:
        raise unsupported(checkpoint, str(error)) from error
    counts = {_count_of(module) for _, module in modules}
    if len(mlps) > 1 or len(counts) > 1:
        raise unsupported(checkpoint, "its MoE layers differ in size or kind")
    sources, chains = _sources(checkpoint, model)
    layers = tuple(
        LayerLayout(path, _layer_sources(checkpoint, path, module, sources, chains)) for path, module in modules
    )
    text, adapter = config.get_text_config(), adapter_of(modules[0][1])
    first = checkpoint.tensor(layers[0].sources["down"][0].replace(EXPERT, "0"))
    if first.dtype not in DTYPES:
        raise unsupported(checkpoint, f"its experts are stored as {first.dtype}; served are {', '.join(DTYPES)}")
    shape = ModelShape(
        architecture=checkpoint.architecture,
        moe_layers=len(layers),
        experts=counts.pop(),
        top_k=adapter.top_k if adapter is not None else _setting(checkpoint, text, TOP_K_NAMES),
        mlp=mlps.pop(),
        dtype=DTYPES[first.dtype],
        vocabulary=_setting(checkpoint, text, ("vocab_size",)),
        max_context=_setting(checkpoint, text, CONTEXT_NAMES, default=_RELATIVE.get(checkpoint.architecture)),
    )
    return ExpertLayout(shape, layers)


def _sources(checkpoint: Checkpoint, model: nn.Module) -> tuple[_Sources, dict[str, Any]]:
    """Where `from_pretrained` would put each tensor, and the converter behind each pattern."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    state = model.state_dict()
    sources: _Sources = defaultdict(lambda: defaultdict(list))
    for name in checkpoint.tensors:
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        sources[target][pattern].append(name)
    return sources, {pattern: converter for converter in converters for pattern in converter.source_patterns}


def _layer_sources(
    checkpoint: Checkpoint, path: str, module: nn.Module, sources: _Sources, chains: Mapping[str, Any]
) -> dict[str, tuple[str, ...]]:
    """One layer's sources, each checked against the parameter's shape."""
    if (adapter := adapter_of(module)) is not None:
        return _listed_sources(checkpoint, path, module, adapter, sources)
    found: dict[str, tuple[str, ...]] = {}
    for field, attribute in parameters_of(module).items():
        target, parameter = f"{path}.{attribute}", module.get_parameter(attribute)
        by_pattern = sources.get(target)
        if not by_pattern:
            raise CheckpointError(f"checkpoint {checkpoint.path}: nothing in it becomes {target}")
        names: list[str] = []
        for pattern in _in_order(checkpoint, by_pattern, chains):
            tensors = by_pattern[pattern]
            fused = pattern is None or "*" not in pattern
            names.append(tensors[0] if fused and len(tensors) == 1 else _template(checkpoint, target, tensors))
        _check_shapes(checkpoint, target, names, parameter.shape)
        found[field] = tuple(names)
    return found


def _listed_sources(
    checkpoint: Checkpoint, path: str, module: nn.Module, adapter: Adapter, sources: _Sources
) -> dict[str, tuple[str, ...]]:
    """`_layer_sources` of experts that are modules of their own: each parameter is one tensor an expert."""
    found: dict[str, tuple[str, ...]] = {}
    for field in adapter.parameters:
        names = [adapter.parameter(field).replace(EXPERT, str(expert)) for expert in range(_count_of(module))]
        tensors: list[str] = []
        for target in (f"{path}.{name}" for name in names):
            if target not in sources:
                raise CheckpointError(f"checkpoint {checkpoint.path}: nothing in it becomes {target}")
            tensors += sources[target][None]
        template = _template(checkpoint, f"{path}.{names[0]}", tensors)
        shape = torch.Size((len(names), *module.get_parameter(names[0]).shape))
        _check_shapes(checkpoint, f"{path}.{names[0]}", [template], shape)
        found[field] = (template,)
    return found


def _in_order(
    checkpoint: Checkpoint, by_pattern: Mapping[str | None, list[str]], chains: Mapping[str, Any]
) -> Sequence[str | None]:
    """The patterns in their order of concatenation; refuses conversions beyond stacking and concatenating."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    converter = chains.get(next(iter(by_pattern)) or "")
    if converter is None:
        return list(by_pattern)
    for operation in converter.operations:
        stacks = isinstance(operation, MergeModulelist) and operation.dim == 0
        joins = isinstance(operation, Concatenate) and operation.dim == 1
        if not (stacks or joins):
            raise unsupported(checkpoint, f"its experts need the conversion {operation!r}, which is not supported")
    return [pattern for pattern in converter.source_patterns if pattern in by_pattern]


def _template(checkpoint: Checkpoint, target: str, tensors: list[str]) -> str:
    """The one name, with `{expert}` for the number in which they differ, that stands for all of `tensors`."""
    parts = [re.split(r"(\d+)", name) for name in tensors]
    same_form = len({len(part) for part in parts}) == 1
    varying = [place for place, column in enumerate(zip(*parts, strict=False)) if len(set(column)) > 1]
    if not same_form or len(varying) != 1:
        raise unsupported(checkpoint, f"the tensors of {target} are not numbered by expert: {tensors[0]}, …")
    template = list(parts[0])
    template[varying[0]] = EXPERT
    return "".join(template)


def _check_shapes(checkpoint: Checkpoint, target: str, names: Sequence[str], shape: torch.Size) -> None:
    """Every expert's tensors must exist and add up to `shape` [E, …]; CheckpointError names the first that fails."""
    experts, rows = shape[0], 0
    for name in names:
        per_expert = EXPERT in name
        shapes = {checkpoint.tensor(name.replace(EXPERT, str(e))).shape for e in range(experts if per_expert else 1)}
        one = shapes.pop()
        fits = not shapes and (per_expert or one[0] == experts)
        one = one if per_expert else one[1:]
        if not fits or len(one) != len(shape) - 1 or one[1:] != shape[2:]:
            raise CheckpointError(f"checkpoint {checkpoint.path}: {name} does not have the shape its config promises")
        rows += one[0]
    if rows != shape[1]:
        raise CheckpointError(f"checkpoint {checkpoint.path}: {target} needs {shape[1]} rows an expert, found {rows}")


def _count_of(module: Any) -> int:
    """Experts of one MoE layer."""
    return int(module.num_experts if adapter_of(module) is not None else module.get_parameter("down_proj").shape[0])


def _mlp_of(model: nn.Module, path: str, module: nn.Module) -> ExpertMLP:
    """The spec of one expert of a MoE layer. Raises ValueError where it, or its layer's routing, cannot be served."""
    if (adapter := adapter_of(module)) is None:
        return expert_mlp_of(module)
    if refusal := adapter.refusal(model.get_submodule(path.rpartition(".")[0])):
        raise ValueError(refusal)
    return probed(module, adapter.mlp(module), adapter.activation(module))


def _setting(checkpoint: Checkpoint, config: Any, names: Sequence[str], default: int | None = None) -> int:
    for name in names:
        if isinstance(value := getattr(config, name, None), int):
            return value
    if default is not None:
        return default
    raise unsupported(checkpoint, f"its config has none of {', '.join(names)}")
