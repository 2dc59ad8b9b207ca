"""Derives an expert layout from transformers' experts interface and weight conversions, without a table of architectures.

Builds the model on `meta` and renames each checkpoint tensor as `from_pretrained` would. A tensor whose new name lies
in an experts module holds weights of that layer's experts. Reads only names and shapes.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from moiety.core.experts import ModelShape
from moiety.errors import CheckpointError
from moiety.model.architectures.adapters import adapter_of
from moiety.model.architectures.recognise import RoutedExperts
from moiety.model.architectures.rope_by_length import served_context
from moiety.model.architectures.transformers_model import (
    checkpoint_model,
    experts_modules,
    load_config,
    towers,
    unsupported,
)
from moiety.model.checkpoint.checkpoint import EXPERT, Checkpoint
from moiety.model.checkpoint.quantised import QuantisedEntry
from moiety.model.checkpoint.side_files import CONFIG_FILE
from moiety.model.experts.accounting import check_tensors
from moiety.model.experts.config_values import (
    DTYPES,
    TOP_K_NAMES,
    computed_dtype,
    longest_text,
    setting,
    without_experts,
)
from moiety.model.experts.layout import ExpertLayout, LayerLayout

_EXPERT_NUMBER = re.compile(r"\.experts\.\d+\.")
# model parameter -> conversion pattern (None: unconverted) -> tensors
_Sources = dict[str, dict[str | None, list[str]]]


def derive_layout(checkpoint: Checkpoint) -> ExpertLayout:
    """Returns the layout of `checkpoint`; raises CheckpointError with the reason if it cannot be served."""
    config = load_config(checkpoint)
    model = checkpoint_model(checkpoint, config)
    modules = experts_modules(model)
    if not modules:
        raise without_experts(checkpoint, config, type(model).__name__)
    try:
        described = {path: adapter_of(config.model_type).recognise(module) for path, module in modules}
    except ValueError as error:
        raise unsupported(checkpoint, str(error)) from error
    kinds = {(experts.mlp, experts.experts) for experts in described.values()}
    if len(kinds) > 1:
        raise unsupported(checkpoint, "its MoE layers differ in size or kind")
    mlp, count = kinds.pop()
    sources, converters = _sources(checkpoint, model)
    check_tensors(checkpoint, model, sources)
    layers = tuple(_layer(checkpoint, path, experts, sources, converters) for path, experts in described.items())
    _check_trunk(checkpoint, model, sources, converters)
    text = config.get_text_config()
    first = checkpoint.tensor(layers[0].sources["down"][0].replace(EXPERT, "0"))
    quantised = isinstance(first, QuantisedEntry)
    if not quantised and first.dtype not in DTYPES:
        raise unsupported(checkpoint, f"its experts are stored as {first.dtype}: must be one of {', '.join(DTYPES)}")
    shape = ModelShape(
        architecture=checkpoint.architecture,
        moe_layers=len(layers),
        experts=count,
        top_k=setting(checkpoint, text, TOP_K_NAMES, count),
        mlp=mlp,
        dtype=computed_dtype(checkpoint, text, None if quantised else DTYPES[first.dtype]),
        vocabulary=setting(checkpoint, text, ("vocab_size",)),
        max_context=served_context(checkpoint, config, model, longest_text(checkpoint, text)),
    )
    return ExpertLayout(shape, layers)


def _sources(checkpoint: Checkpoint, model: nn.Module) -> tuple[_Sources, dict[str, Any]]:
    """Returns which checkpoint tensors become each model parameter, and the WeightConverter of each conversion pattern.

    Both are what `from_pretrained` would use.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    state = model.state_dict()
    sources: _Sources = defaultdict(lambda: defaultdict(list))
    stacked: dict[str, tuple[str, str]] = {}  # name with `*` for the expert's number -> target and pattern
    for name in checkpoint.tensors:
        wildcard = _EXPERT_NUMBER.sub(".experts.*.", name)
        target, pattern = stacked.get(wildcard) or rename_source_key(
            name, renamings, converters, model.base_model_prefix, state
        )
        # So that all experts of a layer need one renaming: a checkpoint may have 90,000 names.
        if pattern is not None and "*" in pattern:
            stacked[wildcard] = target, pattern
        sources[target][pattern].append(name)
    return sources, {pattern: converter for converter in converters for pattern in converter.source_patterns}


def _layer(
    checkpoint: Checkpoint, path: str, experts: RoutedExperts, sources: _Sources, converters: Mapping[str, Any]
) -> LayerLayout:
    """Returns the layout of the MoE layer whose experts module is at `path`, after checking the shapes of its tensors."""
    found: dict[str, tuple[str, ...]] = {}
    transposed = set(experts.transposed)
    for field, parameters in experts.parameters.items():
        names: list[str] = []
        for parameter in parameters:
            target = f"{path}.{parameter.name}"
            by_pattern = _by_pattern(checkpoint, target, parameter.shape[0], sources)
            joined: list[str] = []
            patterns, may_transpose = _conversion(checkpoint, by_pattern, converters)
            for pattern in patterns:
                tensors = by_pattern[pattern]
                fused = pattern is None or "*" not in pattern
                if not fused and len(tensors) > parameter.shape[0]:
                    stored = f"{len(tensors)} tensors such as {tensors[-1]}"
                    raise unsupported(
                        checkpoint, f"it has {stored}, but config.json states {parameter.shape[0]} experts"
                    )
                if fused and len(tensors) == 1:
                    joined.append(tensors[0])
                elif len(tensors) == parameter.shape[0] == 1:
                    joined.append(_only_expert(tensors[0]))
                else:
                    joined.append(_template(checkpoint, target, tensors))
            shape = parameter.shape
            if may_transpose and shape[1] == shape[2]:
                reason = f"{joined[0]} holds square matrices, {shape[1]} x {shape[2]}"
                raise unsupported(checkpoint, f"{reason}: whether they are [in, out] or [out, in] is not known")
            if may_transpose and _published_shape(checkpoint, joined[0]) != shape[1:]:
                shape = (shape[0], shape[2], shape[1])
                transposed ^= {field}
            _check_shapes(checkpoint, target, joined, shape)
            names += joined
        found[field] = tuple(names)
    return LayerLayout(path, found, tuple(sorted(transposed)))


def _by_pattern(checkpoint: Checkpoint, target: str, experts: int, sources: _Sources) -> Mapping[str | None, list[str]]:
    """Returns the checkpoint tensors that become the model parameter `target`, grouped by conversion pattern.

    A `target` with `{expert}` stands for one parameter per expert. Raises CheckpointError if a parameter gets no tensor.
    """
    targets = [target.replace(EXPERT, str(expert)) for expert in range(experts)] if EXPERT in target else [target]
    for name in targets:
        if not sources.get(name):
            raise CheckpointError(f"checkpoint {checkpoint.path}: no tensor in it becomes {name}")
    if len(targets) == 1:
        return sources[targets[0]]
    return {None: [tensor for name in targets for tensors in sources[name].values() for tensor in tensors]}


def _check_trunk(checkpoint: Checkpoint, model: Any, sources: _Sources, converters: Mapping[str, Any]) -> None:
    """Raises CheckpointError if a weight of the trunk is not in the checkpoint, before any weight is read."""
    outside = tuple(f"{path}." for path in (*(path for path, _ in experts_modules(model)), *towers(model)))
    # `sources` has only the first target of a conversion with several; the loader reports missing weights of the others.
    split = {
        target
        for converter in converters.values()
        if len(converter.target_patterns) > 1
        for target in converter.target_patterns
    }
    ignored = (*outside, *model.all_tied_weights_keys)
    state = model.state_dict()
    missing = sorted(
        name
        for name in state.keys() - sources.keys()
        if not name.startswith(ignored) and not any(target in name for target in split)
    )
    if missing:
        untied = (
            f", which {CONFIG_FILE}'s tie_word_embeddings = false calls for" if missing == ["lm_head.weight"] else ""
        )
        raise CheckpointError(f"checkpoint {checkpoint.path}: missing keys: {', '.join(missing[:8])}{untied}")
    for target, by_pattern in sources.items():
        if target in state and not target.startswith(outside) and list(by_pattern) == [None]:
            _check_size(checkpoint, by_pattern[None][0], tuple(state[target].shape), model.config)


def _check_size(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], config: Any) -> None:
    """Raises CheckpointError unless the tensor `name` has the `shape` that the config's values give it."""
    found = checkpoint.tensor(name).shape
    if found == shape:
        return
    vocabulary = config.get_text_config().vocab_size
    if found[1:] == shape[1:] and shape[:1] == (vocabulary,):
        bound = f"must be {found[0]}, the rows of {name}"
        raise CheckpointError(f"{checkpoint.path / CONFIG_FILE}: vocab_size = {vocabulary}: {bound}")
    raise unsupported(checkpoint, f"{name} is {list(found)}, but the values of {CONFIG_FILE} make it {list(shape)}")


def _conversion(
    checkpoint: Checkpoint, by_pattern: Mapping[str | None, list[str]], converters: Mapping[str, Any]
) -> tuple[Sequence[str | None], bool]:
    """Returns a parameter's conversion patterns in order of concatenation, and whether a conversion may transpose.

    If one may, such checkpoints exist in both orientations, and transformers transposes the matrices whose published shape
    differs from the parameter's. A square matrix looks the same in both.

    Raises CheckpointError for conversions other than stacking, concatenating and transposing.
    """
    from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose

    converter = converters.get(next(iter(by_pattern)) or "")
    if converter is None:
        return list(by_pattern), False
    may_transpose = False
    for operation in converter.operations:
        stacks = isinstance(operation, MergeModulelist) and operation.dim == 0
        joins = isinstance(operation, Concatenate) and operation.dim == 1
        transposes = (
            isinstance(operation, Transpose) and (operation.dim0, operation.dim1) == (1, 2) and operation.check_dims
        )
        if not (stacks or joins or transposes):
            raise unsupported(checkpoint, f"its experts need the conversion {operation!r}, which is not supported")
        may_transpose = may_transpose or transposes
    return [pattern for pattern in converter.source_patterns if pattern in by_pattern], may_transpose


def _published_shape(checkpoint: Checkpoint, name: str) -> tuple[int, ...]:
    """Returns the shape [rows, columns] that one expert's matrix has in the published tensor `name`."""
    published = checkpoint.tensor(name.replace(EXPERT, "0")).shape
    return published if EXPERT in name else published[1:]


def _template(checkpoint: Checkpoint, target: str, tensors: list[str]) -> str:
    """Returns one name for all of `tensors`, with `{expert}` in place of the number in which they differ."""
    parts = [re.split(r"(\d+)", name) for name in tensors]
    same_form = len({len(part) for part in parts}) == 1
    varying = [place for place, column in enumerate(zip(*parts, strict=False)) if len(set(column)) > 1]
    if not same_form or len(varying) != 1:
        raise unsupported(checkpoint, f"the tensors of {target} are not numbered by expert: {tensors[0]}, …")
    template = list(parts[0])
    template[varying[0]] = EXPERT
    return "".join(template)


def _only_expert(tensor: str) -> str:
    """Returns the name of the only expert's tensor with `{expert}` in place of its number, the last part that is one."""
    parts = tensor.split(".")
    last = max((place for place, part in enumerate(parts) if part.isdigit()), default=None)
    return tensor if last is None else ".".join([*parts[:last], EXPERT, *parts[last + 1 :]])


def _check_shapes(checkpoint: Checkpoint, target: str, names: Sequence[str], shape: tuple[int, ...]) -> None:
    """Raises CheckpointError unless the experts' tensors `names` exist and together have the shape `shape` [E, …]."""
    experts, rows = shape[0], 0
    for name in names:
        per_expert = EXPERT in name
        shapes = {checkpoint.tensor(name.replace(EXPERT, str(e))).shape for e in range(experts if per_expert else 1)}
        one = shapes.pop()
        fits = not shapes
        if not per_expert and len(one) == len(shape) - 1:  # the rows of one expert after the other
            fits, one = one[0] % experts == 0, (one[0] // experts, *one[1:])
        elif not per_expert:
            fits, one = one[0] == experts, one[1:]
        if not fits or len(one) != len(shape) - 1 or one[1:] != shape[2:]:
            raise CheckpointError(f"checkpoint {checkpoint.path}: {name} does not have the shape its config states")
        rows += one[0]
    if rows != shape[1]:
        raise CheckpointError(f"checkpoint {checkpoint.path}: {target} needs {shape[1]} rows an expert, found {rows}")
