"""Finds the modules of a model that keep states, by running it once with a cache that records which module uses which state.

Then compares each module's result in several steps with its result in one step, and refuses a model whose states the
router would handle wrongly.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from moiety.errors import CheckpointError
from moiety.router.cache.state_slots import SlotStates, StepStates
from moiety.router.state_layers.batched_layer import (
    BatchedStateLayer,
    PositionedAttention,
    RecordedCall,
    concatenated,
)
from moiety.router.state_layers.state_cache import CONVOLUTION, RECURRENT, LayerStates, StateCache, StateName
from moiety.router.token_rows import slice_tokens

_log = logging.getLogger(__name__)
PROBE_TOKENS = 7  # tokens of a trial run: enough for two chunks and some single tokens


class _Recorder(StateCache):
    """The cache of a whole model; records which module uses which state."""

    def __init__(self, number_of_states: int):
        super().__init__(0, LayerStates({}))
        self.layers = _Layers(number_of_states)
        self.uses: dict[nn.Module, RecordedCall] = {}
        self.positioned: dict[nn.Module, RecordedCall] = {}  # attention modules that read token positions
        self._running: list[tuple[nn.Module, RecordedCall]] = []

    def enter(self, module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Forward pre-hook: records that `module` starts, if it received this cache."""
        passed: list[tuple[str | int, Any]] = [*enumerate(arguments), *options.items()]
        for name, value in passed:
            if value is self:
                self._running.append((module, RecordedCall(arguments, options, name)))

    def leave(self, module: nn.Module, *_: Any) -> None:
        """Forward hook: records that `module` is done."""
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
        inputs = super().update_conv_state(conv_states, layer_idx, state_idx, **options)
        self._note(layer_idx, (CONVOLUTION, state_idx))
        return inputs

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **options: Any
    ) -> torch.Tensor:
        states = super().update_recurrent_state(recurrent_states, layer_idx, state_idx, **options)
        self._note(layer_idx, (RECURRENT, state_idx))
        return states

    def set_linear_cache(self, layer_idx: int, linear_cache: torch.Tensor) -> None:
        super().set_linear_cache(layer_idx, linear_cache)
        self._note(layer_idx, (RECURRENT, 0))

    def _note(self, layer: int, name: StateName) -> None:
        if not self._running:
            raise CheckpointError("a module keeps a state in a cache that was not passed to it")
        module, use = self._running[-1]
        use = self.uses.setdefault(module, use)
        use.layer, use.kept[name] = layer, self.layers[layer].kept[name]


class _Layers(dict[int, LayerStates]):
    """Creates the states of a layer on first access."""

    def __init__(self, number_of_states: int):
        super().__init__()
        self._number_of_states = number_of_states

    def __missing__(self, layer: int) -> LayerStates:
        return self.setdefault(layer, LayerStates({}, self._number_of_states))


def batch_state_layers(model: Any, run: Callable[[Any], object]) -> None:
    """Makes a trunk keep its states in slots; does nothing to a model without states.

    `run(cache)` runs `model` on PROBE_TOKENS tokens with `cache` as its past_key_values. Raises CheckpointError
    if a module's result changes when tokens after the first chunk come one by one. If it changes only when they come as
    a second chunk, warns that the module will compute later chunks token by token.
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
            module.forward = PositionedAttention(module.forward, use.cache)
        forgetful: dict[str, None] = {}  # class names of modules, in order
        for module, use in recorder.uses.items():
            layer = module.forward = BatchedStateLayer(module, use)
            layer.forgetful = _forgets(layer, use)
            if layer.forgetful:
                forgetful[type(module).__name__] = None
    except CheckpointError as error:
        raise CheckpointError(f"{config.model_type}: {error}") from error
    for kind in forgetful:
        _log.warning(
            "%s drops its state at the second chunk of a prompt. After the first chunk these layers compute it token by "
            "token, so long prompts are slow unless the setting token_budget is large enough for the whole prompt",
            kind,
        )


@torch.inference_mode()
def _forgets(layer: BatchedStateLayer, use: RecordedCall) -> bool:
    """Whether the module gives another result for a prompt in two chunks than in one.

    Raises CheckpointError if single tokens after the first chunk also give another result.
    """
    whole = _in_steps(layer, use, [PROBE_TOKENS])
    first, rest = PROBE_TOKENS // 2 + 1, PROBE_TOKENS // 2
    if not _close(_in_steps(layer, use, [first, *[1] * rest]), whole):
        raise CheckpointError(
            f"layer {use.layer} gives other results token by token than in one step: its states cannot be served"
        )
    return not _close(_in_steps(layer, use, [first, rest]), whole)


def _in_steps(layer: BatchedStateLayer, use: RecordedCall, counts: Sequence[int]) -> list[torch.Tensor]:
    """Returns the module's output and final states when its tokens come in steps of `counts` tokens."""
    device = next(iter(use.kept.values())).device
    slots = SlotStates(layer.specs, 1, device)
    slot, past, outputs = slots.take(), 0, []
    for count in counts:
        given = use.arguments, use.options
        arguments, options = slice_tokens(given, (1, PROBE_TOKENS), past, past + count)
        step = StepStates.build(slots, [slot], [past], [count], device)
        outputs.append(layer.run(step, arguments, options))
        slots.commit(slot)
        past += count
    joined = concatenated(outputs)
    tokens = [part for part in (joined if isinstance(joined, tuple | list) else [joined]) if part is not None]
    return [*tokens[:1], *(slots.rows(key)[slots.committed(slot)] for key in layer.specs)]


def _close(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> bool:
    """Whether all tensors are equal up to rounding. A dropped state differs by much more than the tolerance."""
    for one, other in zip(found, expected, strict=True):
        tolerance = 1e-3 if one.dtype == torch.float32 and found[0].dtype == torch.float32 else 5e-2
        if (one.float() - other.float()).norm() > tolerance * other.float().norm():
            return False
    return True
