"""`moiety inspect`: sizes of a checkpoint and its parts, from its config and its shards' headers, and its revision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

from torch import nn

from moiety.config.options import RouterOptions, Verify
from moiety.core.text import size
from moiety.model.architectures.adapters import adapter_of
from moiety.model.architectures.gating_description import gating_of
from moiety.model.architectures.supported import served_through
from moiety.model.architectures.transformers_model import (
    checkpoint_model,
    experts_modules,
    load_config,
    quiet_transformers,
    towers,
)
from moiety.model.checkpoint.checkpoint import EXPERT, Checkpoint
from moiety.model.checkpoint.headers import ITEM_BITS
from moiety.model.checkpoint.quantised import Stored
from moiety.model.checkpoint.revision import revision_of
from moiety.model.experts.derive import derive_layout
from moiety.model.experts.layout import ExpertLayout

# config names of the shared experts' count
SHARED = (
    "n_shared_experts",
    "num_shared_experts",
    "moe_num_shared_experts",
)
STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
# Memory of an expert replica: at most PEAK * its weights + FLOOR bytes. A test holds the peak to 1.15 * weights + 200 MB;
# FLOOR also covers torch itself. A router takes at most its weights, its KV cache and ROUTER_FLOOR, which covers transformers,
# too: a router of a tiny model on a CPU took 480 MB.
PEAK, FLOOR, ROUTER_FLOOR = 1.15, 420_000_000, 700_000_000
KV_MEMORY = int(RouterOptions.model_fields["kv_memory"].default)
_size = partial(size, digits=2)


@dataclass(frozen=True, slots=True)
class Inspection:
    """Sizes of a checkpoint and its parts.

    `expert_bytes` and `router_bytes` are sizes in memory. Experts keep the format that the checkpoint stores them in. The
    router's trunk has the checkpoint's dtype.
    """

    architecture: str
    path: str  # seam, adapter, definition
    gating: str
    dtype: str
    layers: int
    moe_layers: int
    experts: int
    top_k: int
    shared_experts: int
    parameters: int  # used to serve text
    active_parameters: int  # used for one token, embeddings included
    expert_parameters: int  # of one expert in one layer
    expert_bytes: int  # of one expert in one layer
    expert_formats: tuple[str, ...]  # in which experts are stored, such as BF16, or gptq (4 bits)
    max_context: int  # tokens of prompt and output
    router_bytes: int
    skipped_bytes: int  # stored and never read: towers for images, next-token predictors
    revision: str  # names the content, see model/checkpoint/revision.py
    memory: int | None = None  # bytes per replica, if given
    groups: int | None = None  # suggested for `memory`; None where not even one expert of each layer fits

    def group_bytes(self, groups: int) -> int:
        """Returns the bytes of the largest group when the experts are split into `groups` groups."""
        return -(-self.experts // groups) * self.moe_layers * self.expert_bytes

    def replica_bytes(self, groups: int) -> int:
        """Returns the most memory that a replica of the largest of `groups` groups takes, in bytes."""
        return int(PEAK * self.group_bytes(groups)) + FLOOR

    def router_memory(self, kv_memory: int = KV_MEMORY) -> int:
        """Returns the most memory that a router takes, in bytes, with a KV cache of `kv_memory`."""
        return self.router_bytes + kv_memory + ROUTER_FLOOR

    @property
    def bits(self) -> float:
        """Bits per parameter of an expert, with scales and zero points."""
        return 8 * self.expert_bytes / self.expert_parameters


def inspect(checkpoint: Checkpoint, memory: int | None = None, verify: Verify = "sampled") -> Inspection:
    """Returns the sizes of a checkpoint and, for `memory` bytes per expert replica, a suggested number of groups.

    Raises CheckpointError where the checkpoint cannot be served.
    """
    with quiet_transformers():
        layout = derive_layout(checkpoint)
        config = load_config(checkpoint)
        model = checkpoint_model(checkpoint, config)
    text, shape = config.get_text_config(), layout.shape
    router_parameters = _router_parameters(model)
    spec = adapter_of(config.model_type).recognise(experts_modules(model)[0][1])
    # A parameter's shape is [E, ...]; without its first dimension it is one expert's.
    expert_parameters = sum(prod(part.shape[1:]) for parts in spec.parameters.values() for part in parts)
    in_experts = _expert_entries(checkpoint, layout)
    stored = sum(entry.nbytes for entry in in_experts)
    router_bytes = router_parameters * ITEM_BITS[STORED[shape.dtype]] // 8
    routed = expert_parameters * shape.experts * shape.moe_layers
    found = Inspection(
        architecture=shape.architecture,
        path=served_through(shape.architecture),
        gating=gating_of(shape.architecture),
        dtype=shape.dtype,
        layers=_layers(config),
        moe_layers=shape.moe_layers,
        experts=shape.experts,
        top_k=shape.top_k,
        shared_experts=_shared(text, model),
        parameters=router_parameters + routed,
        active_parameters=router_parameters + expert_parameters * shape.top_k * shape.moe_layers,
        expert_parameters=expert_parameters,
        expert_bytes=stored // (shape.experts * shape.moe_layers),
        expert_formats=tuple(sorted({entry.dtype for entry in in_experts if len(entry.shape) > 1})),
        max_context=shape.max_context,
        router_bytes=router_bytes,
        skipped_bytes=max(0, sum(entry.nbytes for entry in checkpoint.tensors.values()) - stored - router_bytes),
        revision=revision_of(checkpoint, verify),
    )
    return found if memory is None else suggest(found, memory)


def suggest(found: Inspection, memory: int) -> Inspection:
    """Returns `found` with a suggestion: the fewest groups such that a replica of any group fits into `memory` bytes.

    A replica needs working memory in addition to its weights: see `replica_bytes`.
    """
    fitting = (n for n in range(1, found.experts + 1) if found.replica_bytes(n) <= memory)
    return replace(found, memory=memory, groups=next(fitting, None))


def lines(found: Inspection) -> Iterator[str]:
    """Yields the lines of the report of `moiety inspect`, one per fact."""
    shared = f", {found.shared_experts} shared" if found.shared_experts else ""
    yield f"architecture    {found.architecture} ({found.path}), {found.dtype}"
    yield f"revision        {found.revision}"
    yield f"layers          {found.layers}, of them {found.moe_layers} with {found.experts} experts, top {found.top_k}{shared}"
    yield f"gating          {found.gating}"
    yield f"parameters      {_billions(found.parameters)}, active {_billions(found.active_parameters)}"
    stored = f"{', '.join(found.expert_formats)}, {found.bits:.3g} bits per parameter"
    yield f"context         {found.max_context} tokens"
    one = f"{_size(found.expert_bytes)} per layer, {_billions(found.expert_parameters)} parameters"
    yield f"one expert      {one}, stored as {stored}"
    yield (
        f"router          {_size(found.router_bytes)} of weights; takes up to {_size(found.router_memory())} of memory, "
        f"{_size(KV_MEMORY)} of it kv_memory, the default"
    )
    if found.skipped_bytes:
        yield f"never read      {_size(found.skipped_bytes)}"
    for groups in (n for n in (1, 2, 4, 8, 16, 32, 64) if n <= found.experts):
        yield (
            f"{_groups(groups):<15} {_size(found.group_bytes(groups))} of weights each; a replica takes up to "
            f"{_size(found.replica_bytes(groups))} of memory"
        )
    if found.memory is not None:
        groups_text = _groups(found.groups) if found.groups else "not even one expert of every layer fits"
        yield f"suggested       {groups_text} for {_size(found.memory)} per replica"


def _router_parameters(model: nn.Module) -> int:
    """Counts the parameters outside routed experts and outside towers for images, video and sound.

    Tied weights count once.
    """
    excluded = [path for path, _ in experts_modules(model)] + towers(model)
    inside = {id(tensor) for path in excluded for tensor in model.get_submodule(path).parameters()}
    return sum(tensor.numel() for tensor in model.parameters() if id(tensor) not in inside)


def _expert_entries(checkpoint: Checkpoint, layout: ExpertLayout) -> list[Stored]:
    """Returns all tensors of the routed experts: their matrices, and the scales and other tensors beside them."""
    names = {name for layer in layout.layers for sources in layer.sources.values() for name in sources}
    whole = {name for name in names if EXPERT not in name}
    starts = {f"{name.partition(EXPERT)[0].rpartition('.')[0]}." for name in names - whole}
    return [
        entry
        for name, entry in checkpoint.tensors.items()
        if name in whole or any(start in starts for start in _prefixes(name))
    ]


def _prefixes(name: str) -> Iterator[str]:
    """Yields the prefixes of `name` that end with a dot: "a." and "a.b." for "a.b.c"."""
    at = name.find(".")
    while at >= 0:
        yield name[: at + 1]
        at = name.find(".", at + 1)


def _layers(config: Any) -> int:
    """Counts the decoder layers, and for an encoder-decoder the encoder layers too."""
    layers = int(config.get_text_config().num_hidden_layers)
    if config.is_encoder_decoder:
        layers += int(getattr(config, "num_decoder_layers", 0) or config.decoder_layers)
    return layers


def _shared(config: Any, model: nn.Module) -> int:
    """Returns the number of shared experts of a MoE layer: the config's number, if it states one above 0.

    Otherwise returns 1 if a child module of the MoE block has "shared", but not "gate", in its name, and 0 if none has.
    """
    for name in SHARED:
        if isinstance(value := getattr(config, name, None), int) and value:
            return value
    path = experts_modules(model)[0][0].rpartition(".")[0]
    children = (name for name, _ in model.get_submodule(path).named_children())
    return int(any("shared" in name and "gate" not in name for name in children))


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 10**8 else f"{count / 1e6:.2f} M"


def _groups(count: int) -> str:
    return "1 group" if count == 1 else f"{count} groups"
