"""Lanes: tasks that run in turns on one thread, and steps that are split into lanes."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
import torch
from engine_support import SPEC, VOCABULARY, CountingModel, NoHop

from moiety.core.expert_backend import CallClass
from moiety.core.sampling import Sampling
from moiety.errors import HopFailed, Unavailable
from moiety.model.seam import ForwardContext, current_context
from moiety.policy.lane_tuner import LaneTuner
from moiety.router.cache.kv_cache import KVCache
from moiety.router.lanes import Lanes
from moiety.router.sequence.sequence import Sequence
from moiety.router.sequence.step_plan import Scheduled, StepPlan
from moiety.router.step_context import StepContext
from moiety.router.step_runner import StepRunner
from moiety.telemetry.tracing import NO_SPAN


def sequence(*tokens: int) -> Sequence:
    """Returns a request with the prompt `tokens`."""
    return Sequence("r", list(tokens), len(tokens), Sampling(max_tokens=4), frozenset(), emit=lambda _: None)


def plan_of(cache: KVCache, *sequences: Sequence) -> StepPlan:
    """Plans all tokens of `sequences` in one step, and allocates their blocks."""
    for each in sequences:
        cache.grow(each.table, len(each.tokens))
    return StepPlan(tuple(Scheduled.of(each, len(each.tokens)) for each in sequences))


def context() -> StepContext:
    """Returns the context of a step that is not interrupted."""
    return StepContext(CallClass.PREFILL, NO_SPAN, lambda: None, lambda *_: None)


def test_a_lane_that_waits_lets_another_run() -> None:
    """While one lane waits the next computes. Each continues where it stopped, on the caller's thread."""
    log: list[str] = []
    came = iter(["first", "second"])
    lanes = Lanes(lambda _: log.append(next(came)))

    def task(name: str) -> int:
        log.append(f"{name} sends")
        lanes.wait(1.0)
        log.append(f"{name} goes on")
        return threading.get_ident()

    idents = lanes.run([lambda: task("a"), lambda: task("b")])
    assert log == ["a sends", "b sends", "first", "a goes on", "b goes on"]
    assert set(idents) == {threading.get_ident()}


def test_the_thread_blocks_until_the_first_lane_is_due() -> None:
    """When all lanes wait, the thread blocks only until the first of them is due."""
    blocked: list[float] = []
    lanes = Lanes(blocked.append)
    lanes.run([lambda: lanes.wait(5.0), lambda: lanes.wait(0.5)])
    assert len(blocked) == 1
    assert 0.4 < blocked[0] <= 0.5


def test_waiting_outside_of_lanes_blocks() -> None:
    """A caller without a lane, such as a step that is not split, blocks the thread."""
    blocked: list[float] = []
    lanes = Lanes(blocked.append)
    lanes.wait(2.0)
    assert lanes.run([lambda: lanes.wait(3.0)]) == [None]
    assert blocked == [2.0, 3.0]


def test_an_error_ends_the_other_lanes_where_they_wait() -> None:
    """One lane's error is raised, and the others run only their `finally` blocks."""
    log: list[str] = []
    lanes = Lanes(lambda _: None)

    def waits() -> None:
        try:
            lanes.wait(60.0)
            log.append("went on")
        finally:
            log.append("cleaned up")

    def fails() -> None:
        raise Unavailable("lost")

    began = time.monotonic()
    with pytest.raises(Unavailable, match="lost"):
        lanes.run([waits, fails])
    assert log == ["cleaned up"]
    assert time.monotonic() - began < 5
    assert lanes.run([lambda: 1, lambda: 2]) == [1, 2]


def test_plans_are_split_evenly_and_in_order() -> None:
    """No sequence is split or lost, and the parts differ by less than the longest item."""
    cache = KVCache(SPEC, 1 << 12, torch.device("cpu"), block_tokens=4)
    plan = plan_of(cache, *(sequence(*range(length)) for length in (1, 5, 1, 1, 3, 1)))
    for parts in (1, 2, 3, 6, 9):
        split = plan.split(parts)
        assert [item for part in split for item in part.scheduled] == list(plan.scheduled)
        assert len(split) <= parts
        assert all(part.scheduled for part in split)
    halves = plan.split(2)
    assert abs(halves[0].tokens - halves[1].tokens) < 5


def test_a_split_step_gives_the_same_logits() -> None:
    """Rows come in the plan's order for any number of lanes, and the tuner receives the duration of each step."""
    model = CountingModel()
    cache = KVCache(SPEC, 1 << 12, torch.device("cpu"), block_tokens=4)
    plan = plan_of(cache, *(sequence(n, n + 1) for n in range(0, 10, 2)))
    tuner = LaneTuner()
    forward = StepRunner(model, cache, [NoHop(), NoHop()], Lanes(lambda _: None), tuner)
    for _ in range(12):
        logits = forward.run(plan, context())
        assert logits.argmax(-1).tolist() == [(n + 2) % VOCABULARY for n in range(0, 10, 2)]
    assert {len(ids) for ids in model.steps} == {10, 6, 4}
    assert list(tuner.verdicts()) == [(CallClass.PREFILL, 4)]


def test_failed_tokens_of_a_lane_are_positions_in_the_step() -> None:
    """HopFailed of the second lane names positions in the whole step."""
    model = CountingModel()
    cache = KVCache(SPEC, 1 << 12, torch.device("cpu"), block_tokens=4)
    plan = plan_of(cache, sequence(1, 2), sequence(5, 6))

    def lose(ids: list[int]) -> None:
        if 5 in ids:
            raise HopFailed([0], Unavailable("gone"))

    model.before = lose
    forward = StepRunner(model, cache, [NoHop(), NoHop()], Lanes(lambda _: None))
    with pytest.raises(HopFailed) as failed:
        forward.run(plan, context())
    assert plan.owners(failed.value.tokens) == [plan.scheduled[1].sequence]


def test_lanes_see_their_own_context() -> None:
    """Each of two interleaved forward passes sees its own backend and batch, before and after the other has run."""
    lanes = Lanes(lambda _: None)

    class AskingModel(CountingModel):
        """Records the context before and after it switches lanes."""

        def __init__(self) -> None:
            super().__init__()
            self.seen: list[tuple[ForwardContext, ForwardContext]] = []

        def forward(self, input_ids: torch.Tensor, logits_to_keep: torch.Tensor, **_: object) -> SimpleNamespace:
            before = current_context()
            lanes.wait(0.0)
            self.seen.append((before, current_context()))
            return SimpleNamespace(logits=torch.zeros(1, len(logits_to_keep), VOCABULARY))

    model, backends = AskingModel(), [NoHop(), NoHop()]
    cache = KVCache(SPEC, 1 << 12, torch.device("cpu"), block_tokens=4)
    plan = plan_of(cache, sequence(1), sequence(2))
    StepRunner(model, cache, backends, lanes).run(plan, context())
    assert [context.backend for context, _ in model.seen] == backends
    for item, (before, after) in zip(plan.scheduled, model.seen, strict=True):
        assert before is after
        assert before.batch is not None
        assert before.batch.tables.tolist() == [item.sequence.table.held]
