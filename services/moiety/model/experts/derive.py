"""Derives an expert layout from transformers: no table of architectures, only the experts seam and its conversions.

The model is built on `meta`; each checkpoint tensor is renamed as `from_pretrained` would, and those that end in an
experts module become that layer's sources. Nothing is read but names and shapes.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from moiety.core.experts import ModelShape
from moiety.errors import CheckpointError
from moiety.model.architectures.adapters.protocol import RoutedExperts
from moiety.model.architectures.supported import nearest
from moiety.model.architectures.transformers_model import (
    causal_lm_class,
    experts_modules,
    load_config,
    meta_model,
    routed_experts,
    towers,
    unsupported,
)
from moiety.model.checkpoint.checkpoint import EXPERT, Checkpoint
from moiety.model.checkpoint.quantised import QuantisedEntry
from moiety.model.experts.layout import ExpertLayout, LayerLayout

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

_NUMBER = re.compile(r"\.experts\.\d+\.")
_Sources = dict[str, dict[str | None, list[str]]]  # model parameter -> conversion pattern (None: as it is) -> tensors


def derive_layout(checkpoint: Checkpoint) -> ExpertLayout:
    """The layout of `checkpoint`; raises CheckpointError naming the architecture and what is missing."""
    config = load_config(checkpoint)
    model = meta_model(causal_lm_class(checkpoint, config), config)
    modules = experts_modules(model)
    if not modules:
        told = "it has no MoE layer that transformers routes through its experts interface, and no adapter"
        raise unsupported(checkpoint, f"{told}; {nearest(checkpoint.architecture)}")
    try:
        described = {path: routed_experts(module) for path, module in modules}
    except ValueError as error:
        raise unsupported(checkpoint, str(error)) from error
    kinds = {(experts.mlp, experts.experts) for experts in described.values()}
    if len(kinds) > 1:
        raise unsupported(checkpoint, "its MoE layers differ in size or kind")
    mlp, count = kinds.pop()
    sources, chains = _sources(checkpoint, model)
    layers = tuple(_layer(checkpoint, path, experts, sources, chains) for path, experts in described.items())
    _check_others(checkpoint, model, sources, chains)
    text = config.get_text_config()
    first = checkpoint.tensor(layers[0].sources["down"][0].replace(EXPERT, "0"))
    quantised = isinstance(first, QuantisedEntry)
    if not quantised and first.dtype not in DTYPES:
        raise unsupported(checkpoint, f"its experts are stored as {first.dtype}; served are {', '.join(DTYPES)}")
    shape = ModelShape(
        architecture=checkpoint.architecture,
        moe_layers=len(layers),
        experts=count,
        top_k=_setting(checkpoint, text, TOP_K_NAMES),
        mlp=mlp,
        dtype=_computed_dtype(text) if quantised else DTYPES[first.dtype],
        vocabulary=_setting(checkpoint, text, ("vocab_size",)),
        max_context=_setting(checkpoint, text, CONTEXT_NAMES),
    )
    return ExpertLayout(shape, layers)


def _computed_dtype(config: Any) -> str:
    """What a quantised model computes in: its config's dtype, bfloat16 where it names none."""
    named = str(getattr(config, "dtype", None)).removeprefix("torch.")
    return named if named in DTYPES.values() else "bfloat16"


def _sources(checkpoint: Checkpoint, model: nn.Module) -> tuple[_Sources, dict[str, Any]]:
    """Where `from_pretrained` would put each tensor, and the converter behind each pattern."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    state = model.state_dict()
    sources: _Sources = defaultdict(lambda: defaultdict(list))
    stacked: dict[str, tuple[str, str]] = {}  # a name without its expert's number -> what all such names become
    for name in checkpoint.tensors:
        alike = _NUMBER.sub(".experts.*.", name)
        target, pattern = stacked.get(alike) or rename_source_key(
            name, renamings, converters, model.base_model_prefix, state
        )
        if pattern is not None and "*" in pattern:  # 90,000 names of a large checkpoint are renamed once a layer
            stacked[alike] = target, pattern
        sources[target][pattern].append(name)
    return sources, {pattern: converter for converter in converters for pattern in converter.source_patterns}


def _layer(
    checkpoint: Checkpoint, path: str, experts: RoutedExperts, sources: _Sources, chains: Mapping[str, Any]
) -> LayerLayout:
    """Where one layer's experts are published, each tensor checked against the parameter that it becomes."""
    found: dict[str, tuple[str, ...]] = {}
    transposed = set(experts.transposed)
    for field, parameters in experts.parameters.items():
        names: list[str] = []
        for parameter in parameters:
            target = f"{path}.{parameter.name}"
            by_pattern = _by_pattern(checkpoint, target, parameter.shape[0], sources)
            joined: list[str] = []
            patterns, turned = _conversion(checkpoint, by_pattern, chains)
            for pattern in patterns:
                tensors = by_pattern[pattern]
                fused = pattern is None or "*" not in pattern
                joined.append(tensors[0] if fused and len(tensors) == 1 else _template(checkpoint, target, tensors))
            shape = parameter.shape
            if turned and _published_shape(checkpoint, joined[0]) != shape[1:]:
                shape = (shape[0], shape[2], shape[1])
                transposed ^= {field}
            _check_shapes(checkpoint, target, joined, shape)
            names += joined
        found[field] = tuple(names)
    return LayerLayout(path, found, tuple(sorted(transposed)))


def _by_pattern(checkpoint: Checkpoint, target: str, experts: int, sources: _Sources) -> Mapping[str | None, list[str]]:
    """The tensors that become `target`, which with `{expert}` in its name is a parameter of each expert by itself."""
    targets = [target.replace(EXPERT, str(expert)) for expert in range(experts)] if EXPERT in target else [target]
    for wanted in targets:
        if not sources.get(wanted):
            raise CheckpointError(f"checkpoint {checkpoint.path}: nothing in it becomes {wanted}")
    if len(targets) == 1:
        return sources[targets[0]]
    return {None: [name for wanted in targets for names in sources[wanted].values() for name in names]}


def _check_others(checkpoint: Checkpoint, model: Any, sources: _Sources, chains: Mapping[str, Any]) -> None:
    """Raises CheckpointError where a weight that a router needs is not in the checkpoint, before any is read."""
    apart = tuple(f"{path}." for path in (*(path for path, _ in experts_modules(model)), *towers(model)))
    # What a conversion splits in several is not told by its first target: the loader will say what is missing of it.
    split = {target for chain in chains.values() if len(chain.target_patterns) > 1 for target in chain.target_patterns}
    known = (*apart, *model.all_tied_weights_keys)
    missing = sorted(
        name
        for name in model.state_dict().keys() - sources.keys()
        if not name.startswith(known) and not any(target in name for target in split)
    )
    if missing:
        raise CheckpointError(f"checkpoint {checkpoint.path}: missing keys: {', '.join(missing[:8])}")


def _conversion(
    checkpoint: Checkpoint, by_pattern: Mapping[str | None, list[str]], chains: Mapping[str, Any]
) -> tuple[Sequence[str | None], bool]:
    """The patterns in their order of concatenation, and whether matrices are turned unless they fit as they are.

    Refuses other conversions than stacking, concatenating and turning.
    """
    from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose

    converter = chains.get(next(iter(by_pattern)) or "")
    if converter is None:
        return list(by_pattern), False
    turned = False
    for operation in converter.operations:
        stacks = isinstance(operation, MergeModulelist) and operation.dim == 0
        joins = isinstance(operation, Concatenate) and operation.dim == 1
        turns = isinstance(operation, Transpose) and (operation.dim0, operation.dim1) == (1, 2) and operation.check_dims
        if not (stacks or joins or turns):
            raise unsupported(checkpoint, f"its experts need the conversion {operation!r}, which is not supported")
        turned = turned or turns
    return [pattern for pattern in converter.source_patterns if pattern in by_pattern], turned


def _published_shape(checkpoint: Checkpoint, name: str) -> tuple[int, ...]:
    """What one expert has of the first tensor, [rows, columns]."""
    published = checkpoint.tensor(name.replace(EXPERT, "0")).shape
    return published if EXPERT in name else published[1:]


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


def _check_shapes(checkpoint: Checkpoint, target: str, names: Sequence[str], shape: tuple[int, ...]) -> None:
    """Every expert's tensors must exist and add up to `shape` [E, …]; CheckpointError names the first that fails."""
    experts, rows = shape[0], 0
    for name in names:
        per_expert = EXPERT in name
        shapes = {checkpoint.tensor(name.replace(EXPERT, str(e))).shape for e in range(experts if per_expert else 1)}
        one = shapes.pop()
        fits = not shapes
        if not per_expert and len(one) == len(shape) - 1:  # all experts' rows below each other
            fits, one = one[0] % experts == 0, (one[0] // experts, *one[1:])
        elif not per_expert:
            fits, one = one[0] == experts, one[1:]
        if not fits or len(one) != len(shape) - 1 or one[1:] != shape[2:]:
            raise CheckpointError(f"checkpoint {checkpoint.path}: {name} does not have the shape its config promises")
        rows += one[0]
    if rows != shape[1]:
        raise CheckpointError(f"checkpoint {checkpoint.path}: {target} needs {shape[1]} rows an expert, found {rows}")


def _setting(checkpoint: Checkpoint, config: Any, names: Sequence[str]) -> int:
    for name in names:
        if isinstance(value := getattr(config, name, None), int):
            return value
    raise unsupported(checkpoint, f"its config has none of {', '.join(names)}")
