"""Splits a change of placement into stages of a few layers each, so that replicas need little spare memory."""

from __future__ import annotations

from collections.abc import Mapping

from moiety.core.experts import ExpertSet
from moiety.core.replica import Placement


def placement_stages(current: Placement, target: Placement, layers: int) -> tuple[Placement, ...]:
    """Returns the placements that lead from `current` to `target`, one epoch each, changing at most `layers` layers each.

    `layers` = 0 changes all layers in one stage. Returns no stage if `current` and `target` hold the same experts.
    """
    names = sorted({*current.held, *target.held})
    before = {name: current.held.get(name, ExpertSet()) for name in names}
    after = {name: target.held.get(name, ExpertSet()) for name in names}
    changing = sorted(
        layer
        for layer in {layer for held in (*before.values(), *after.values()) for layer in held.by_layer}
        if any(before[name].layer(layer) != after[name].layer(layer) for name in names)
    )
    step = layers or max(len(changing), 1)
    stages: list[Placement] = []
    for end in range(step, len(changing) + step, step):
        done = frozenset(changing[:end])
        held = {name: _mixed(before[name], after[name], done) for name in names}
        stages.append(Placement(current.epoch + 1 + len(stages), held))
    return tuple(stages)


def _mixed(before: ExpertSet, after: ExpertSet, done: frozenset[int]) -> ExpertSet:
    """Returns the experts of `after` in the layers of `done`, and those of `before` in the other layers."""
    mixed: Mapping[int, frozenset[int]] = {
        layer: after.layer(layer) if layer in done else before.layer(layer)
        for layer in sorted({*before.by_layer, *after.by_layer})
    }
    return ExpertSet({layer: ids for layer, ids in mixed.items() if ids})
