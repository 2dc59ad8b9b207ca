"""Runs state layers (Mamba, linear attention, convolutions) over packed steps, with no code per model.

transformers' modules want their tokens as [sequences, tokens, D], and a cache. Which modules have a state, and of what
shape, is learnt by running the model once with a cache that notes who asks it for one. Their `forward` is then replaced:
a step's sequences that have equally many tokens in it go through the module together, all decode tokens among them,
with their states gathered from the slots; what comes back is written aside in the slots.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from moiety.errors import CheckpointError
from moiety.router.cachespec import StateKey, StateSpec
from moiety.router.statecache import CONVOLUTION, RECURRENT, PositionCache, StateCache, StateLayer, StateName
from moiety.router.states import Group, SlotStates, StepStates

_log = logging.getLogger(__name__)
_step: ContextVar[StepStates | None] = ContextVar("moiety_step_states", default=None)
PROBE_TOKENS = 7  # with which modules are tried: enough for two chunks and some single tokens


@contextmanager
def use_states(step: StepStates | None) -> Iterator[None]:
    """Forwards inside the block, in this thread or lane, keep their states there; with None, nowhere."""
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)


class Mixer:
    """Stands in for the `forward` of a module that keeps states."""

    def __init__(self, module: nn.Module, use: _Use):
        self.specs: Mapping[StateKey, StateSpec] = {
            (use.layer, f"{kind} {index}"): StateSpec(kind, tuple(state.shape[1:]), state.dtype)
            for (kind, index), state in use.kept.items()
        }
        self.forgetful = False  # it drops its state over a second chunk, whose tokens it is therefore given one by one
        self._names = dict(zip(use.kept, self.specs, strict=True))
        self._layer, self._cache, self._compute = use.layer, use.cache, module.forward

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """The module's output for the tokens of a packed step, [1, T, ...]."""
        step = _step.get()
        if step is None:
            return self._compute(*arguments, **options)
        options.pop("moiety_batch", None)
        given = arguments, options
        if (order := step.order) is not None:
            given = _tokenwise(given, (1, step.tokens), lambda tensor: tensor[:, order])
        outputs, begin = [], 0
        for group in step.groups:
            outputs.append(self._group(step.states, group, _part(given, step.tokens, begin, group)))
            begin += group.sequences * group.tokens
        return _joined(outputs, step)

    def _group(self, slots: SlotStates, group: Group, given: Any) -> Any:
        """The output [sequences, tokens, ...] for arguments of that shape."""
        found = {}
        if (read := group.read) is not None:
            found = {name: slots.rows(key).index_select(0, read) for name, key in self._names.items()}
        states = StateLayer(found, 1 + max(index for _, index in self._names))
        cache = StateCache(self._layer, states)
        if self.forgetful and group.tokens > 1 and read is not None:
            shape = group.sequences, group.tokens
            singles = (_cut(given, shape, token, token + 1) for token in range(group.tokens))
            output = _behind_one_another([self._call(single, cache) for single in singles])
        else:
            output = self._call(given, cache)
        for name, state in states.kept.items():
            rows = slots.rows(self._names[name])
            rows.index_copy_(0, group.write, state.to(rows.dtype))
        return output

    def _call(self, given: tuple[tuple[Any, ...], dict[str, Any]], cache: StateCache) -> Any:
        arguments, options = given
        return _with_cache(self._compute, arguments, options, self._cache, cache)


class _Positioned:
    """Stands in for the `forward` of an attention module that asks its cache where its tokens are (Llama 4's)."""

    def __init__(self, compute: Callable[..., Any], cache: str | int):
        self._compute, self._cache = compute, cache

    def __call__(self, *arguments: Any, moiety_batch: Any, **options: Any) -> Any:
        device = next(v for v in (*arguments, *options.values()) if isinstance(v, torch.Tensor)).device
        positions = PositionCache((moiety_batch.length - 1).to(device))
        return _with_cache(self._compute, arguments, {**options, "moiety_batch": moiety_batch}, self._cache, positions)


def mixers(model: nn.Module) -> list[Mixer]:
    """Those that `install` has put in place."""
    return [found for module in model.modules() if isinstance(found := module.__dict__.get("forward"), Mixer)]


def _with_cache(
    compute: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any], at: str | int, cache: Any
) -> Any:
    """The call with `cache` as the argument at this place or of this name."""
    if isinstance(at, int):
        return compute(*arguments[:at], cache, *arguments[at + 1 :], **options)
    return compute(*arguments, **{**options, at: cache})


# Arguments and outputs -------------------------------------------------------------------------------------------


def _tokenwise(value: Any, shape: tuple[int, int], change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`value` with every tensor in it changed that begins with `shape`, one row a token."""
    if isinstance(value, torch.Tensor):
        return change(value) if value.shape[:2] == shape else value
    if isinstance(value, tuple | list):
        return type(value)(_tokenwise(item, shape, change) for item in value)
    if isinstance(value, dict):
        return {name: _tokenwise(item, shape, change) for name, item in value.items()}
    return value


def _cut(value: Any, shape: tuple[int, int], begin: int, end: int) -> Any:
    """The tokens from `begin` to `end` of every sequence."""
    return _tokenwise(value, shape, lambda tensor: tensor[:, begin:end])


def _part(given: Any, tokens: int, begin: int, group: Group) -> Any:
    """Of the arguments for all `tokens` those for a group, [sequences, tokens, ...]."""
    shape = group.sequences, group.tokens
    end = begin + group.sequences * group.tokens
    return _tokenwise(given, (1, tokens), lambda tensor: tensor[0, begin:end].unflatten(0, shape))


def _joined(outputs: Sequence[Any], step: StepStates) -> Any:
    """The groups' outputs [sequences, tokens, ...] as one of the whole step, [1, T, ...]."""
    flat = [
        _tokenwise(output, (group.sequences, group.tokens), lambda tensor: tensor.flatten(0, 1)[None])
        for output, group in zip(outputs, step.groups, strict=True)
    ]
    joined = _behind_one_another(flat)
    if (back := step.back) is not None:
        joined = _tokenwise(joined, (1, step.tokens), lambda tensor: tensor[:, back])
    return joined


def _behind_one_another(outputs: Sequence[Any]) -> Any:
    """Outputs of one structure, [B, tokens, ...] each, as one; other tensors in them are nobody's to read."""
    if len(outputs) == 1:
        return outputs[0]
    if isinstance(outputs[0], tuple | list):
        return type(outputs[0])(_behind_one_another(parts) for parts in zip(*outputs, strict=True))
    if isinstance(outputs[0], torch.Tensor):
        alike = len({(output.shape[0], output.shape[2:]) for output in outputs}) == 1
        return torch.cat(list(outputs), dim=1) if alike else None
    return outputs[0]


# Finding out -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Use:
    """What was seen of one module in a run: which states it keeps, and how it was called."""

    arguments: tuple[Any, ...]
    options: dict[str, Any]
    cache: str | int  # the keyword that brings the cache, or its place among the arguments
    layer: int = -1
    kept: dict[StateName, torch.Tensor] = field(default_factory=dict)


class _Recorder(StateCache):
    """Notes which module asks for which state, while it is the cache of a whole model."""

    def __init__(self, number_of_states: int):
        super().__init__(0, StateLayer({}))
        self.layers = _Layers(number_of_states)
        self.uses: dict[nn.Module, _Use] = {}
        self.positioned: dict[nn.Module, _Use] = {}  # attention modules that ask where their tokens are
        self._running: list[tuple[nn.Module, _Use]] = []

    def enter(self, module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """`module` begins; a forward pre-hook."""
        places: list[tuple[str | int, Any]] = [*enumerate(arguments), *options.items()]
        for place, value in places:
            if value is self:
                self._running.append((module, _Use(arguments, options, place)))

    def leave(self, module: nn.Module, *_: Any) -> None:
        """`module` is done; a forward hook."""
        if self._running and self._running[-1][0] is module:
            self._running.pop()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        if self._running:
            self.positioned.setdefault(*self._running[-1])
        return 0

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return None

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return None

    def get_linear_cache(self, layer_idx: int) -> torch.Tensor | None:
        return None

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **options: Any
    ) -> torch.Tensor:
        seen = super().update_conv_state(conv_states, layer_idx, state_idx, **options)
        self._note(layer_idx, (CONVOLUTION, state_idx))
        return seen

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **options: Any
    ) -> torch.Tensor:
        seen = super().update_recurrent_state(recurrent_states, layer_idx, state_idx, **options)
        self._note(layer_idx, (RECURRENT, state_idx))
        return seen

    def set_linear_cache(self, layer_idx: int, linear_cache: torch.Tensor) -> None:
        super().set_linear_cache(layer_idx, linear_cache)
        self._note(layer_idx, (RECURRENT, 0))

    def _note(self, layer: int, name: StateName) -> None:
        if not self._running:
            raise CheckpointError("a module keeps a state in a cache that it was not given")
        module, use = self._running[-1]
        use = self.uses.setdefault(module, use)
        use.layer, use.kept[name] = layer, self.layers[layer].kept[name]


class _Layers(dict[int, StateLayer]):
    """As many layers as are asked for."""

    def __init__(self, number_of_states: int):
        super().__init__()
        self._number_of_states = number_of_states

    def __missing__(self, layer: int) -> StateLayer:
        return self.setdefault(layer, StateLayer({}, self._number_of_states))


def install(model: Any, run: Callable[[Any], object]) -> None:
    """Lets a loaded router keep its states in slots; a model without states stays as it is.

    `run(cache)` passes PROBE_TOKENS tokens through `model`, with `cache` as its past_key_values. Raises CheckpointError
    where a module does not come to the same result in several steps as in one.
    """
    config = model.config.get_text_config()
    recorder = _Recorder(getattr(config, "number_of_conv_states", 1))
    try:
        with ExitStack() as hooks:
            for module in model.modules():
                hooks.callback(module.register_forward_pre_hook(recorder.enter, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(recorder.leave).remove)
            run(recorder)
        for module, use in recorder.positioned.items():
            module.forward = _Positioned(module.forward, use.cache)
        forgetful: dict[type[nn.Module], bool] = {}
        for module, use in recorder.uses.items():
            mixer = module.forward = Mixer(module, use)
            if (kind := type(module)) not in forgetful:
                forgetful[kind] = _forgets(mixer, use)
            mixer.forgetful = forgetful[kind]
    except CheckpointError as error:
        raise CheckpointError(f"{config.model_type}: {error}") from error
    for kind in (kind for kind, forgets in forgetful.items() if forgets):
        _log.warning(
            "%s drops its state over a second chunk of a prompt: prompts longer than what a step's token budget leaves "
            "for them are computed token by token in these layers, behind their first chunk",
            kind.__name__,
        )


@torch.inference_mode()
def _forgets(mixer: Mixer, use: _Use) -> bool:
    """Whether the module cannot take a prompt in chunks; raises CheckpointError where it cannot go on at all."""
    whole = _in_steps(mixer, use, [PROBE_TOKENS])
    first, rest = PROBE_TOKENS // 2 + 1, PROBE_TOKENS // 2
    if not _close(_in_steps(mixer, use, [first, *[1] * rest]), whole):
        raise CheckpointError(
            f"the states of layer {use.layer} do not lead where its whole text leads: it cannot be served"
        )
    return not _close(_in_steps(mixer, use, [first, rest]), whole)


def _in_steps(mixer: Mixer, use: _Use, counts: Sequence[int]) -> list[torch.Tensor]:
    """What the module answers and keeps when its tokens come in steps of so many."""
    device = next(iter(use.kept.values())).device
    slots = SlotStates(mixer.specs, 1, device)
    slot, past, outputs = slots.take(), 0, []
    for count in counts:
        given = use.arguments, use.options
        arguments, options = _cut(given, (1, PROBE_TOKENS), past, past + count)
        with use_states(StepStates.build(slots, [slot], [past], [count], device)):
            outputs.append(mixer(*arguments, **options))
        slots.commit(slot)
        past += count
    joined = _behind_one_another(outputs)
    tokens = [part for part in (joined if isinstance(joined, tuple | list) else [joined]) if part is not None]
    return [*tokens[:1], *(slots.rows(key)[slots.committed(slot)] for key in mixer.specs)]


def _close(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> bool:
    """Equal but for rounding; a state that was dropped is off by a good part of itself."""
    for one, other in zip(found, expected, strict=True):
        tolerance = 1e-3 if one.dtype == torch.float32 and found[0].dtype == torch.float32 else 5e-2
        if (one.float() - other.float()).norm() > tolerance * other.float().norm():
            return False
    return True
