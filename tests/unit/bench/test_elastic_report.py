"""The report of `moiety bench elastic`, from given records."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest

from moiety.bench.elastic.report import ElasticReport, LoadSample, ReplicaStart, elastic_lines, plot, report_of
from moiety.bench.elastic.traffic import SkewedPrompts
from moiety.errors import FailedPrecondition

BEGAN = 1000.0
PROMPTS = SkewedPrompts((20, 21), (0.7, 0.3), "experts-0")
OLD = ReplicaStart("a", "experts-0", 900.0, 901.0, 902.0, 903.0)
NEW = ReplicaStart("b", "experts-0", 1013.0, 1014.5, 1015.0, 1015.5)


def decision(at: float, name: str, before: int, after: int) -> dict[str, Any]:
    """Returns a decision as the registry records it."""
    return {"time": at, "deployment": name, "from": before, "to": after, "reason": "busy"}


def report(*decisions: dict[str, Any], failures: tuple[str, ...] = ()) -> ElasticReport:
    """Returns the report of a load that rises after 10 s and falls after 20 s."""
    moments = [LoadSample(BEGAN + second, {"experts-0": 1 + (second >= 15)}, {}, 0, (OLD, NEW)) for second in range(30)]
    gaps = [(BEGAN + tenth / 10, 0.02 if tenth < 120 else 0.05) for tenth in range(300)]
    traffic: Any = SimpleNamespace(requests=7, failures=list(failures), gaps=gaps)
    phases = [(BEGAN, 1.0), (BEGAN + 10, 5.0), (BEGAN + 20, 1.0)]
    return report_of(100.0, PROMPTS, phases, moments, decisions, traffic)


GROWS = decision(1011.0, "experts-0", 1, 2)
SHRINKS = decision(1025.0, "experts-0", 2, 1)


def test_a_start_is_split_from_the_decision_on() -> None:
    """A start is split into schedule, load, warm and serve, each counted from the end of the stage before."""
    grown, shrunk = report(GROWS, SHRINKS).changes
    assert grown.starts == ({"schedule": 2.0, "load": 1.5, "warm": 0.5, "serve": 0.5, "total": 4.5},)
    assert grown.since_step_s == 1.0
    assert shrunk.starts == ()
    assert shrunk.since_step_s is None
    assert report(GROWS, SHRINKS).first_row_s == 5.5


def test_token_gaps_of_a_change_are_those_around_it() -> None:
    """Token gaps count from the decision to three seconds after the new replica served; earlier gaps do not."""
    grown, _ = report(GROWS, SHRINKS).changes
    assert grown.itl_p99_ms == pytest.approx(50.0)


def test_only_the_hot_group_may_follow() -> None:
    """The report holds only if the hot group grew and shrank, no other group changed, and no request failed."""
    assert report(GROWS, SHRINKS).passed
    assert not report(GROWS).passed
    assert not report(GROWS, SHRINKS, decision(1012.0, "experts-1", 1, 2)).passed
    assert not report(GROWS, SHRINKS, failures=("lost",)).passed
    assert "NOT as it should be" in list(elastic_lines(report(GROWS)))[-1]


def test_a_picture_needs_matplotlib_or_is_drawn(tmp_path) -> None:
    """`plot` writes an SVG; without matplotlib its error says what to install."""
    file = tmp_path / "elastic.svg"
    if find_spec("matplotlib") is None:
        with pytest.raises(FailedPrecondition, match=r"moiety\[plot\]"):
            plot(report(GROWS, SHRINKS), file)
    else:
        plot(report(GROWS, SHRINKS), file)
        assert "<svg" in file.read_text()
