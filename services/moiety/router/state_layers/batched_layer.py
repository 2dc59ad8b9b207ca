"""Runs state layers (Mamba, linear attention, convolutions) over packed steps, with no code per model.

transformers' modules take tokens as [sequences, tokens, D], and a cache. A BatchedStateLayer replaces the `forward` of each
module that keeps a state (`state_discovery.py` finds them). Sequences with the same number of tokens in a step pass
through the module together, for example all that decode; new sequences form groups of their own. A group's states are
gathered from the slots' committed rows, and its new states are written to the slots' other rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from moiety.model.seam import current_batch
from moiety.router.cache.cache_spec import StateKey, StateSpec
from moiety.router.cache.state_slots import SlotStates, StateGroup, StepStates
from moiety.router.state_layers.state_cache import LayerStates, PositionCache, StateCache, StateName
from moiety.router.token_rows import map_token_rows, slice_tokens


@dataclass(slots=True)
class RecordedCall:
    """A record of one module from a discovery run: which states it keeps, and how it was called."""

    arguments: tuple[Any, ...]
    options: dict[str, Any]
    cache: str | int  # keyword or position of the argument that holds the cache
    layer: int = -1
    kept: dict[StateName, torch.Tensor] = field(default_factory=dict)


class BatchedStateLayer:
    """Replaces the `forward` of a module that keeps states."""

    def __init__(self, module: nn.Module, use: RecordedCall):
        self.specs: Mapping[StateKey, StateSpec] = {
            (use.layer, f"{kind} {index}"): StateSpec(kind, tuple(state.shape[1:]), state.dtype)
            for (kind, index), state in use.kept.items()
        }
        self.forgetful = False  # it drops its state at a second chunk, so later chunks go token by token
        self._names = dict(zip(use.kept, self.specs, strict=True))
        self._layer, self._cache, self._compute = use.layer, use.cache, module.forward

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Returns the module's output for the tokens of the running step; without states, of the module's own `forward`."""
        states: StepStates | None = current_batch().states
        return self._compute(*arguments, **options) if states is None else self.run(states, arguments, options)

    def run(self, step: StepStates, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Returns the module's output for the tokens of a packed step, [1, T, ...]; reads and writes their states."""
        given: Any = arguments, options
        if (order := step.order) is not None:
            given = map_token_rows(given, (1, step.tokens), lambda tensor: tensor[:, order])
        outputs, begin = [], 0
        for group in step.groups:
            outputs.append(self._run_group(step.states, group, _group_part(given, step.tokens, begin, group)))
            begin += group.sequences * group.tokens
        return _joined(outputs, step)

    def _run_group(self, slots: SlotStates, group: StateGroup, given: Any) -> Any:
        """Runs one group on its arguments, [sequences, tokens, ...]; returns output of that shape and writes the new states."""
        found = {}
        if (read := group.read) is not None:
            found = {name: slots.rows(key).index_select(0, read) for name, key in self._names.items()}
        states = LayerStates(found, 1 + max(index for _, index in self._names))
        cache = StateCache(self._layer, states)
        if self.forgetful and group.tokens > 1 and read is not None:
            shape = group.sequences, group.tokens
            singles = (slice_tokens(given, shape, token, token + 1) for token in range(group.tokens))
            output = concatenated([self._call(single, cache) for single in singles])
        else:
            output = self._call(given, cache)
        for name, state in states.kept.items():
            rows = slots.rows(self._names[name])
            rows.index_copy_(0, group.write, state.to(rows.dtype))
        return output

    def _call(self, given: tuple[tuple[Any, ...], dict[str, Any]], cache: StateCache) -> Any:
        arguments, options = given
        return _with_cache(self._compute, arguments, options, self._cache, cache)


class PositionedAttention:
    """Replaces the `forward` of an attention module that reads token positions from its cache (as Llama 4's does)."""

    def __init__(self, compute: Callable[..., Any], cache: str | int):
        self._compute, self._cache = compute, cache

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        device = next(v for v in (*arguments, *options.values()) if isinstance(v, torch.Tensor)).device
        positions = PositionCache(current_batch().positions.to(device))
        return _with_cache(self._compute, arguments, options, self._cache, positions)


def batched_state_layers(model: nn.Module) -> list[BatchedStateLayer]:
    """Returns the BatchedStateLayers that `state_discovery.batch_state_layers` has installed in `model`."""
    return [
        found for module in model.modules() if isinstance(found := module.__dict__.get("forward"), BatchedStateLayer)
    ]


def _with_cache(
    compute: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any], at: str | int, cache: Any
) -> Any:
    """Calls `compute` with `cache` in place of the argument `at`, a position or a keyword."""
    if isinstance(at, int):
        return compute(*arguments[:at], cache, *arguments[at + 1 :], **options)
    return compute(*arguments, **{**options, at: cache})


# Arguments and outputs -------------------------------------------------------------------------------------------


def _group_part(given: Any, tokens: int, begin: int, group: StateGroup) -> Any:
    """Returns one group's arguments, [sequences, tokens, ...], cut from those of the whole step, [1, `tokens`, ...]."""
    shape = group.sequences, group.tokens
    end = begin + group.sequences * group.tokens
    return map_token_rows(given, (1, tokens), lambda tensor: tensor[0, begin:end].unflatten(0, shape))


def _joined(outputs: Sequence[Any], step: StepStates) -> Any:
    """Joins the groups' outputs, [sequences, tokens, ...] each, to [1, T, ...], in the order of the step's tokens."""
    flat = [
        map_token_rows(output, (group.sequences, group.tokens), lambda tensor: tensor.flatten(0, 1)[None])
        for output, group in zip(outputs, step.groups, strict=True)
    ]
    joined = concatenated(flat)
    if (back := step.back) is not None:
        joined = map_token_rows(joined, (1, step.tokens), lambda tensor: tensor[:, back])
    return joined


def concatenated(outputs: Sequence[Any]) -> Any:
    """Concatenates outputs of equal structure along dimension 1, tokens. Tensors that differ in another size become None."""
    if len(outputs) == 1:
        return outputs[0]
    if isinstance(outputs[0], tuple | list):
        return type(outputs[0])(concatenated(parts) for parts in zip(*outputs, strict=True))
    if isinstance(outputs[0], torch.Tensor):
        alike = len({(output.shape[0], output.shape[2:]) for output in outputs}) == 1
        return torch.cat(list(outputs), dim=1) if alike else None
    return outputs[0]
