"""The schedule: a pure function of the seed that soon has a fault of every family; the choice of kinds by name."""

from __future__ import annotations

from itertools import islice

import pytest

from moiety.errors import ConfigError
from moiety.tools.chaos.kinds import KINDS, chosen
from moiety.tools.chaos.schedule import schedule

FAMILIES = {kind.family for kind in KINDS}


def test_a_seed_decides_everything():
    """The same seed gives the same faults, at the same tokens, with the same victims; another seed does not."""
    first, again, other = (list(islice(schedule(seed, KINDS), 50)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_every_round_has_every_family_and_every_kind_gets_its_turn():
    """As many faults as there are families have one of each; enough rounds have every kind."""
    largest = max(sum(kind.family == family for kind in KINDS) for family in FAMILIES)
    planned = list(islice(schedule(7, KINDS), len(FAMILIES) * largest))
    assert {plan.kind.family for plan in planned[: len(FAMILIES)]} == FAMILIES
    assert {plan.kind for plan in planned} == set(KINDS)


def test_kinds_are_chosen_by_name_or_family():
    """A name chooses one kind, a family all of it; on Ray only what is possible there is left; others are refused."""
    assert [kind.name for kind in chosen(["expert-kill"], ray=False)] == ["expert-kill"]
    assert {kind.family for kind in chosen(["redis", "liar"], ray=False)} == {"redis", "liar"}
    assert chosen([], ray=False) == KINDS
    assert all(kind.on_ray for kind in chosen([], ray=True))
    with pytest.raises(
        ConfigError, match="only = 'meteor': must be a kind that --list shows, or one of device, expert"
    ):
        chosen(["meteor"], ray=False)
    with pytest.raises(ConfigError, match="possible on Ray"):
        chosen(["machine"], ray=True)


def test_names_are_unique_and_bounds_positive():
    """Reports group by name, so no two kinds share one."""
    assert len({kind.name for kind in KINDS}) == len(KINDS)
    assert all(kind.bound_s > 0 and kind.lasts_s > 0 for kind in KINDS)
