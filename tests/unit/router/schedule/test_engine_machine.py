"""The engine with little memory under any sequence of requests, cancellations and failures."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from engine_support import Listener, RememberingModel, engine_of, expected_tokens, finish, prompt_of, submit
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from moiety.core.sampling import Sampling
from moiety.errors import Cancelled, DeadlineExceeded, HopFailed, MoietyError, NoHolder
from moiety.router.sequence.sequence import Sequence
from moiety.wire.deadline import Deadline

SHARED = prompt_of(99, 14)


@dataclass(slots=True)
class Request:
    """A request and what may end it before its last token."""

    sequence: Sequence
    listener: Listener
    prompt: list[int]
    sampling: Sampling
    may_end: tuple[type[MoietyError], ...] = ()


class EngineMachine(RuleBasedStateMachine):
    """Submits, cancels and steps. Hops and passes fail. The oracle computes each output alone and naively."""

    def __init__(self) -> None:
        super().__init__()
        self.model = RememberingModel()
        self.model.before = self.before
        self.engine = engine_of(self.model, slots=4, token_budget=9, blocks=14, speculative_tokens=2)
        self.requests: list[Request] = []
        self.lost: list[float] = []  # shares of the next passes: at which of its tokens the hop fails
        self.bugs = 0  # passes that raise an exception that is not ours

    def before(self, ids: list[int]) -> None:
        if self.bugs:
            self.bugs -= 1
            raise KeyError("a bug")
        if self.lost:
            raise HopFailed([int(self.lost.pop() * len(ids))], NoHolder(0, [3], 30.0))

    @rule(
        seed=st.integers(0, 5),
        own=st.integers(1, 14),
        shared=st.integers(0, 14),
        output=st.integers(1, 12),
        n=st.sampled_from((1, 1, 1, 2, 4)),
        prompt_logprobs=st.booleans(),
        priority=st.integers(0, 2),
        tenant=st.sampled_from("xy"),
        late=st.sampled_from((False, False, False, True)),
    )
    def submit(
        self,
        seed: int,
        own: int,
        shared: int,
        output: int,
        n: int,
        prompt_logprobs: bool,
        priority: int,
        tenant: str,
        late: bool,
    ) -> None:
        prompt = [*SHARED[:shared], *prompt_of(seed, own)]
        sampling = Sampling(output, ignore_eos=True, n=n, prompt_logprobs=prompt_logprobs)
        deadline = Deadline.after(0.0 if late else None)
        sequence, listener = submit(
            self.engine, prompt, sampling=sampling, priority=priority, tenant=tenant, deadline=deadline
        )
        may_end = (DeadlineExceeded,) if late else ()
        self.requests.append(Request(sequence, listener, prompt, sampling, may_end))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.requests))
        request.may_end += (Cancelled,)
        self.engine.cancel(request.sequence)

    @rule(steps=st.integers(1, 5))
    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.engine.step()

    @rule(places=st.lists(st.floats(0, 0.99), min_size=1, max_size=2))
    def hops_fail(self, places: list[float]) -> None:
        self.lost = places
        self.fail(NoHolder)

    @rule(passes=st.integers(1, 4))
    def passes_fail(self, passes: int) -> None:
        self.bugs = passes
        self.fail(MoietyError)

    def fail(self, error: type[MoietyError]) -> None:
        for request in self.requests:
            request.may_end += (error,)
        self.engine.step()
        self.lost, self.bugs = [], 0

    @invariant()
    def nothing_is_lost(self) -> None:
        self.engine.check_integrity()
        ended = sum(len(request.listener.ends) for request in self.requests)
        assert ended <= sum(request.sampling.n for request in self.requests)

    def teardown(self) -> None:
        finish(self.engine, 5000)
        for request in self.requests:
            expected = expected_tokens(request.prompt, request.sampling.max_tokens)
            assert sorted(request.listener.ends) == list(range(request.sampling.n)), "a choice did not end"
            for choice, end in request.listener.ends.items():
                got = request.listener.choices[choice]
                assert got == expected[: len(got)]
                assert end.error is None or type(end.error) in request.may_end, end.error
                assert end.error is not None or len(got) == request.sampling.max_tokens


QUICK = settings(max_examples=80, stateful_step_count=25, deadline=None, derandomize=True)


@pytest.mark.parametrize(
    "effort", [QUICK, pytest.param(settings(QUICK, max_examples=1500, derandomize=False), marks=pytest.mark.slow)]
)
def test_every_request_ends_with_the_tokens_of_running_alone(effort: settings):
    """No block is lost, nobody starves, and a request ends early only by its own deadline, cancellation or failure.

    The larger effort takes a minute, for 1,500 histories of up to 25 actions.
    """
    run_state_machine_as_test(EngineMachine, settings=effort)
