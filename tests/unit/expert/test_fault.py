"""Failure injection: a device shows the fault that it is told to show, until it is cleared, and no other text is a fault."""

from __future__ import annotations

import pytest
import torch
from expert_support import Answers, MakeRuntime, call_for, plainly, rows_for, tensor_of, waiting_for

from moiety.core.experts import ExpertSet
from moiety.errors import ConfigError, MoietyError
from moiety.expert.batcher import Computed
from moiety.expert.fault import Fault
from moiety.expert.runtime import Runtime
from moiety.testing import eventually

ALL = ExpertSet.uniform(3, range(6))


def submit(runtime: Runtime) -> Answers:
    """Queues a call of one row; returns the collector of its answer."""
    waiting, answers = waiting_for(call_for([0]))
    runtime.submit(waiting)
    return answers


def rows_of(answers: Answers) -> torch.Tensor:
    """Waits for the answer and returns its rows."""
    computed = answers.one()
    assert isinstance(computed, Computed)
    return tensor_of(computed)


@pytest.mark.parametrize(
    "value", ["fail", "nan 1", "slow", "slow x", "slow -1", "slow 0", "slow inf", "slow nan", None, 1, True, []]
)
def test_what_is_no_fault_is_refused(value: object):
    """Anything but the documented texts is refused, with what may be set."""
    with pytest.raises(ConfigError, match=r"user_config\.fault = .*: must be raise, nan, hang or slow SECONDS"):
        Fault.parse(value)


def test_an_empty_text_clears_the_fault():
    """The empty text means that the device is well."""
    assert Fault.parse("") is None


def test_a_raising_device_fails_each_call(make_runtime: MakeRuntime):
    """With `raise` each call gets an error; without it the next one is computed."""
    runtime = make_runtime(ALL)
    runtime.device.fault = Fault.parse("raise")
    assert [type(submit(runtime).one()) for _ in range(2)] == [MoietyError] * 2
    runtime.device.fault = None
    torch.testing.assert_close(rows_of(submit(runtime)), plainly([0], rows_for(1)))


def test_a_hanging_device_goes_on_when_the_fault_is_cleared(make_runtime: MakeRuntime):
    """With `hang` no call is answered; once that is cleared, the batch that hung is computed correctly."""
    runtime = make_runtime(ALL)
    runtime.device.fault = Fault.parse("hang")
    first, second = submit(runtime), submit(runtime)
    assert not first.arrived.wait(0.2)
    runtime.device.fault = None
    for answers in (first, second):
        torch.testing.assert_close(rows_of(answers), plainly([0], rows_for(1)))


async def test_a_slow_device_takes_longer(make_runtime: MakeRuntime):
    """With `slow SECONDS` rows are right and each batch takes that much longer, also by its own account."""
    runtime = make_runtime(ALL)
    runtime.device.fault = Fault.parse("slow 0.1")
    answers = submit(runtime)
    torch.testing.assert_close(rows_of(answers), plainly([0], rows_for(1)))
    computed = answers.one()
    assert isinstance(computed, Computed)
    assert computed.compute_ms >= 100
    await eventually(lambda: runtime.idle)
