"""Types for a model's shape, for what one expert computes, and for the set of experts that a replica holds.

Legend: I intermediate size, E experts per layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from weakref import WeakValueDictionary

from moiety.errors import ConfigError

# Bounds of a set that is read without knowing its model. The largest published models have about 100 MoE layers and 512
# experts per layer, each cut into a few slices.
MAX_LAYERS = 1024
MAX_EXPERTS = 1 << 16
MAX_PAIRS = 1 << 20
_CHARACTERS = 16  # of text, at most, that one (layer, expert) pair takes


@dataclass(frozen=True, slots=True, weakref_slot=True)
class ExpertSet:
    """A set of experts, such as those that a replica holds: MoE layer ordinal -> expert ids.

    The text form is compact and readable: `0-31:0-7` is experts 0 to 7 of layers 0 to 31.
    `0:1,5;3:2` is experts 1 and 5 of layer 0, and expert 2 of layer 3.
    """

    by_layer: Mapping[int, frozenset[int]] = field(default_factory=dict)

    @classmethod
    def uniform(cls, layers: int, experts: Iterable[int]) -> ExpertSet:
        """Returns the set of the same `experts` in each of the first `layers` MoE layers."""
        held = frozenset(experts)
        return cls(dict.fromkeys(range(layers), held) if held else {})

    @classmethod
    def parse(cls, text: str, layers: int | None = None, experts: int | None = None) -> ExpertSet:
        """Parses the text form, the inverse of `str()`. Raises ValueError if the text does not have that form.

        `layers` and `experts` (per layer): those of the model, where it is known. Raises ValueError for an id outside of them,
        before anything of that size is allocated. Equal texts give the same object while it is in use, because thousands of
        replicas may share a few texts.
        """
        bounds = _Bounds(layers or MAX_LAYERS, experts or MAX_EXPERTS)
        key = text, bounds.layers, bounds.experts
        if (known := _parsed.get(key)) is None:
            known = _parsed[key] = _parse_set(text, bounds)
        return known

    def __str__(self) -> str:
        layers_of: dict[frozenset[int], list[int]] = {}
        for layer, ids in sorted(self.by_layer.items()):
            layers_of.setdefault(ids, []).append(layer)
        return ";".join(f"{_format_ranges(layers)}:{_format_ranges(ids)}" for ids, layers in layers_of.items())

    def __contains__(self, pair: tuple[int, int]) -> bool:
        layer, expert = pair
        return expert in self.by_layer.get(layer, frozenset())

    def __len__(self) -> int:
        return sum(map(len, self.by_layer.values()))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for layer, ids in sorted(self.by_layer.items()):
            for expert in sorted(ids):
                yield layer, expert

    def __or__(self, other: ExpertSet) -> ExpertSet:
        layers = self.by_layer.keys() | other.by_layer.keys()
        return ExpertSet({layer: self.layer(layer) | other.layer(layer) for layer in sorted(layers)})

    def __sub__(self, other: ExpertSet) -> ExpertSet:
        left = {layer: ids - other.layer(layer) for layer, ids in self.by_layer.items()}
        return ExpertSet({layer: ids for layer, ids in left.items() if ids})

    def layer(self, layer: int) -> frozenset[int]:
        return self.by_layer.get(layer, frozenset())


@dataclass(frozen=True, slots=True)
class ExpertMLP:
    """What one expert computes, declared as data, so that kernels need no code per model.

    It is `down(act(gate(x)) * up(x))` if `gated`, else `down(act(up(x)))`. `activation` is a name of
    `moiety_kernels.reference.activation.ACTIVATIONS`; `swiglu_clamped` is gpt-oss's
    `(clamp(up, ±limit) + 1) * gate * sigmoid(alpha * gate)` with gate clamped from above only.
    """

    hidden: int  # D
    intermediate: int  # I
    activation: str = "silu"
    gated: bool = True
    interleaved: bool = False  # gate and up alternate along the output dimension, instead of gate first, then up
    biased: bool = False
    limit: float | None = None
    alpha: float | None = None

    @property
    def parameters(self) -> int:
        """Number of elements in one expert's matrices."""
        return (3 if self.gated else 2) * self.hidden * self.intermediate


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What every service must know about a checkpoint before it reads a weight."""

    architecture: str  # transformers' model_type
    moe_layers: int
    experts: int  # E, per MoE layer
    top_k: int
    mlp: ExpertMLP
    dtype: str  # as published: float32, bfloat16, float16
    vocabulary: int
    max_context: int

    def sliced(self, slices: int) -> ModelShape:
        """Returns the shape of the sliced model: each expert is cut into `slices` parts along dimension I.

        Slice s of expert e counts as expert `e * slices + s` wherever experts are named: in holdings, calls and counters.
        Raises ConfigError if the intermediate size is not a multiple of `slices`.
        """
        if slices < 1 or self.mlp.intermediate % slices:
            bound = f"must divide {self.mlp.intermediate}, the intermediate size of the model's experts"
            raise ConfigError("slices", slices, bound)
        mlp = replace(self.mlp, intermediate=self.mlp.intermediate // slices)
        return replace(self, experts=self.experts * slices, top_k=self.top_k * slices, mlp=mlp)

    def sliced_partition(self, groups: int, slices: int) -> tuple[ExpertSet, ...]:
        """Returns the default placement of the sliced model: for each group, the slices that the group holds.

        The experts are divided into `groups // slices` parts, as by `partition`. Each part goes to `slices` groups: the
        first holds slice 0 of every expert in the part, the next slice 1, and so on. Raises ConfigError if `groups` is
        not a multiple of `slices`, or if there are fewer experts than parts.
        """
        if groups % slices:
            raise ConfigError("groups", groups, f"must be a multiple of {slices}, the number of slices per expert")
        return tuple(
            ExpertSet({layer: frozenset(e * slices + s for e in ids) for layer, ids in share.by_layer.items()})
            for share in self.partition(groups // slices)
            for s in range(slices)
        )

    def partition(self, groups: int) -> tuple[ExpertSet, ...]:
        """Returns the default placement: `groups` contiguous, near-equal blocks of experts, each across all MoE layers.

        Raises ConfigError if there are fewer experts than groups.
        """
        if not 1 <= groups <= self.experts:
            raise ConfigError("groups", groups, f"must be 1 to {self.experts}, the model's experts per layer")
        base, extra = divmod(self.experts, groups)
        bounds = [0]
        for group in range(groups):
            bounds.append(bounds[-1] + base + (group < extra))
        return tuple(ExpertSet.uniform(self.moe_layers, range(bounds[g], bounds[g + 1])) for g in range(groups))


@dataclass(frozen=True, slots=True)
class _Bounds:
    """The ids that a text may name: layers and experts from 0 to below these numbers."""

    layers: int
    experts: int

    @property
    def pairs(self) -> int:
        return min(self.layers * self.experts, MAX_PAIRS)


_parsed: WeakValueDictionary[tuple[str, int, int], ExpertSet] = WeakValueDictionary()


def _parse_set(text: str, bounds: _Bounds) -> ExpertSet:
    if len(text) > (most := 64 + _CHARACTERS * bounds.pairs):
        raise ValueError(f"{text[:40]!r}...: {len(text)} characters, at most {most} for {bounds.pairs} experts")
    by_layer: dict[int, frozenset[int]] = {}
    repeated: dict[int, set[int]] = {}  # layers that several parts name
    pairs = 0
    for part in filter(None, (piece.strip() for piece in text.split(";"))):
        layers, separator, experts = part.partition(":")
        if not separator:
            raise ValueError(f"{_shown(part)}: expected LAYERS:EXPERTS, such as 0-31:0-7")
        among = frozenset(_parse_ranges(layers, "layer", bounds.layers))
        ids = frozenset(_parse_ranges(experts, "expert", bounds.experts))
        if (pairs := pairs + len(among) * len(ids)) > bounds.pairs:
            raise ValueError(f"{_shown(text)}: names more than {bounds.pairs} experts, all layers together")
        for layer in among:
            if layer not in by_layer:
                by_layer[layer] = ids  # one set for all layers of the part
                continue
            if layer not in repeated:
                repeated[layer] = set(by_layer[layer])
            repeated[layer].update(ids)
    return ExpertSet(by_layer | {layer: frozenset(ids) for layer, ids in repeated.items()})


def _parse_ranges(text: str, what: str, bound: int) -> Iterator[int]:
    named = 0
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        first, last = int(low), int(high) if dash else int(low)
        if last < first:
            raise ValueError(f"{_shown(part)}: the range runs backwards")
        if last >= bound:
            raise ValueError(f"{what} {_shown(part)}: must be 0 to {bound - 1}")
        if (named := named + last - first + 1) > 2 * bound:
            raise ValueError(f"{_shown(text)}: names {what}s again and again")
        yield from range(first, last + 1)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "...")


def _format_ranges(ids: Iterable[int]) -> str:
    runs: list[list[int]] = []
    for value in sorted(ids):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)
