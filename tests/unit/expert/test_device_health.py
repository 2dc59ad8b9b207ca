"""A replica knows when its device is sick: it says so, answers FAILED instead of wrong rows, and recovers by itself."""

from __future__ import annotations

import logging
import weakref

import pytest
import torch
from expert_support import SHAPE, Answers, MakeRuntime, call_for, plainly, rows_for, tensor_of, waiting_for, weights_of

from moiety.core.experts import ExpertSet
from moiety.errors import MoietyError, Unavailable
from moiety.expert.batcher import Computed
from moiety.expert.fault import Fault
from moiety.expert.runtime import Runtime
from moiety.testing import eventually
from moiety_kernels import ExpertWeights

ALL = ExpertSet.uniform(3, range(6))


def submit(runtime: Runtime, rows: torch.Tensor | None = None) -> Answers:
    """Queues a call of one row for expert 0; returns the collector of its answer."""
    waiting, answers = waiting_for(call_for([0], rows=rows))
    runtime.submit(waiting)
    return answers


def is_well(runtime: Runtime) -> bool:
    """Looks at the runtime's health once."""
    try:
        runtime.check_health()
    except Unavailable:
        return False
    return True


@pytest.mark.parametrize("fault", ["raise", "nan"])
async def test_a_device_that_fails_is_sick_until_it_works_again(
    make_runtime: MakeRuntime, fault: str, caplog: pytest.LogCaptureFixture
):
    """One failed batch is enough, as the device fails zeros, too; cleared, it recovers without a call. The log has one line."""
    runtime = make_runtime(ALL)
    assert isinstance(submit(runtime).one(), Computed)
    runtime.check_health()
    runtime.device.fault = Fault.parse(fault)
    with caplog.at_level(logging.WARNING):
        assert isinstance(submit(runtime).one(), MoietyError)
        await eventually(lambda: not is_well(runtime))
        for _ in range(50):
            assert isinstance(submit(runtime).one(), MoietyError)
    assert len(caplog.records) == 1
    with pytest.raises(Unavailable, match=r"the device is sick: \d+ units of work failed in a row"):
        runtime.check_health()
    runtime.device.fault = None
    await eventually(lambda: is_well(runtime))
    torch.testing.assert_close(tensor_of(submit(runtime).one()), plainly([0], rows_for(1)))


async def test_a_device_that_hangs_is_sick_until_it_gets_on(make_runtime: MakeRuntime, monkeypatch: pytest.MonkeyPatch):
    """A batch that does not end within the limit makes the replica sick; once it ends, the replica is well."""
    monkeypatch.setattr("moiety.expert.runtime.LEAST_S", 0.3)
    runtime = make_runtime(ALL)
    assert isinstance(submit(runtime).one(), Computed)
    runtime.device.fault = Fault.parse("hang")
    hanging = submit(runtime)
    assert is_well(runtime)
    await eventually(lambda: not is_well(runtime))
    with pytest.raises(Unavailable, match=r"the device is sick: no progress for \d\.\d s, the limit is 0\.3 s"):
        runtime.check_health()
    runtime.device.fault = None
    assert isinstance(hanging.one(), Computed)
    assert is_well(runtime)


def test_one_failing_call_among_others_is_no_sickness(make_runtime: MakeRuntime):
    """A call that fails, however often, does not make a device sick that computes zeros with the same expert."""

    def load(held: ExpertSet) -> dict[tuple[int, int], ExpertWeights]:
        return {pair: weights_of(pair) for pair in held}

    runtime = make_runtime(ALL, load=load)
    wrong = torch.full((1, SHAPE.mlp.hidden), float("nan"))
    for _ in range(10):
        submit(runtime, wrong).one()
        assert is_well(runtime)


@pytest.mark.parametrize("value", [3e38, float("nan"), float("inf")])
def test_rows_that_no_device_could_compute_blame_nobody(make_runtime: MakeRuntime, value: float):
    """Finite rows that overflow, and rows that are not finite, get what plain arithmetic gives; the device stays well."""
    runtime = make_runtime(ALL)
    rows = torch.full((1, SHAPE.mlp.hidden), value)
    assert not plainly([0], rows).isfinite().all()
    torch.testing.assert_close(tensor_of(submit(runtime, rows).one()), plainly([0], rows), equal_nan=True)
    assert is_well(runtime)


async def test_a_failure_that_is_over_keeps_no_weights(make_runtime: MakeRuntime, caplog: pytest.LogCaptureFixture):
    """An expert that a placement takes away after its batch has failed is freed."""
    caplog.set_level(logging.CRITICAL)  # a captured record's traceback would keep them
    read: list[weakref.ref[object]] = []

    def load(held: ExpertSet) -> dict[tuple[int, int], ExpertWeights]:
        weights = {pair: weights_of(pair) for pair in held}
        read.extend(weakref.ref(one.down) for pair, one in weights.items() if pair == (0, 0))
        return weights

    runtime = make_runtime(ALL, load=load)
    runtime.device.fault = Fault.parse("raise")
    assert isinstance(submit(runtime).one(), MoietyError)
    runtime.device.fault = None
    await eventually(lambda: is_well(runtime))
    runtime.hold(ExpertSet.uniform(3, range(1, 6)), epoch=1)
    assert runtime.drop_leaving()
    waiting, answers = waiting_for(call_for([1], layer=1))  # until then the thread holds its last batch
    runtime.submit(waiting)
    assert isinstance(answers.one(), Computed)
    await eventually(lambda: read[0]() is None)


def test_wrong_weights_are_found(make_runtime: MakeRuntime):
    """An expert whose weights are NaN gives NaN for zeros, too: its calls fail, others do not."""

    def load(held: ExpertSet) -> dict[tuple[int, int], ExpertWeights]:
        nan = torch.full((SHAPE.mlp.hidden, SHAPE.mlp.intermediate), float("nan"))
        return {
            pair: ExpertWeights(weights_of(pair).gate_up, nan) if pair == (0, 0) else weights_of(pair) for pair in held
        }

    runtime = make_runtime(ALL, load=load)
    failed = submit(runtime).one()
    assert "not finite, even for rows of zeros" in str(failed)
    waiting, answers = waiting_for(call_for([1]))
    runtime.submit(waiting)
    assert isinstance(answers.one(), Computed)
