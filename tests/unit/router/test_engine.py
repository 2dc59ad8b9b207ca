"""The engine's steps with an arithmetic model: which requests end on lost experts, cancellation or a deadline."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from engine_support import CountingModel, Listener, NoHop, engine_of, finish, submit

from moiety.core.sampling import FinishReason, Sampling
from moiety.errors import (
    Cancelled,
    DeadlineExceeded,
    HopFailed,
    InvalidRequest,
    MoietyError,
    NoHolder,
    ResourceExhausted,
    Unavailable,
)
from moiety.router.engine import Engine
from moiety.router.sequence.drafts import Drafter
from moiety.router.sequence.sequence import Emitted, Sequence
from moiety.telemetry.tracing import NO_SPAN
from moiety.wire.deadline import Deadline


@pytest.fixture
def model() -> CountingModel:
    """Returns the model of the fixture `engine`."""
    return CountingModel()


@pytest.fixture
def hop() -> NoHop:
    """Returns the hop of the fixture `engine`."""
    return NoHop()


@pytest.fixture
def engine(model: CountingModel, hop: NoHop) -> Iterator[Engine]:
    """Builds an engine with 4 slots, 10 tokens a step, a queue of 3 and 25 blocks of 4 tokens. The test steps it."""
    made = engine_of(model, hop=hop, queue_limit=3)
    yield made
    made.stop(5)


class FailingSpan(type(NO_SPAN)):  # type: ignore[misc]
    """A span that is not exported; remembers its errors."""

    def __init__(self) -> None:
        self.errors: list[BaseException | str] = []

    def error(self, cause: BaseException | str) -> None:
        self.errors.append(cause)


def test_requests_run_together_and_end_independently(engine: Engine, model: CountingModel):
    """Each stream gets its own tokens, up to max_tokens or its stop token. The stop token is sent."""
    (_, long), (_, stopping) = submit(engine, [1] * 4), submit(engine, [7])
    finish(engine)
    assert (long.tokens, long.end.finish) == ([2, 3, 4], FinishReason.LENGTH)
    assert (stopping.tokens, stopping.end.finish) == ([8, 9], FinishReason.STOP)
    assert model.steps == [[7, 1, 1, 1, 1], [2, 8], [3]], "both advance in the same steps"
    assert (engine.load.running, engine.load.waiting) == (0, 0)


def test_a_long_prompt_is_cut_and_delays_no_stream(engine: Engine, model: CountingModel):
    """Prefill gets the part of the token budget that decode leaves."""
    _, decoding = submit(engine, [1], max_tokens=8)
    engine.step()
    _, long = submit(engine, [5] * 20, max_tokens=1)
    for _ in range(3):
        engine.step()
    assert [len(step) for step in model.steps] == [1, 10, 10, 3]
    assert len(decoding.tokens) == 4
    assert long.tokens == [6]


def test_lost_experts_end_only_the_requests_that_need_them(engine: Engine, model: CountingModel):
    """The step runs again without the failed requests, and the others' tokens are unchanged."""
    listeners = {first: submit(engine, [first] * 2)[1] for first in (1, 11, 21)}

    def lose(ids: list[int]) -> None:
        if 11 in ids:
            raise HopFailed([ids.index(11)], NoHolder(0, [3], 30.0))

    model.before = lose
    finish(engine)
    assert isinstance(listeners[11].end.error, NoHolder)
    assert listeners[11].tokens == []
    assert listeners[1].tokens == [2, 3, 4]
    assert listeners[21].tokens == [22, 23, 24]


def test_a_request_cancelled_while_its_layer_waits_is_taken_out(engine: Engine, model: CountingModel, hop: NoHop):
    """The waiting step is interrupted and runs again without the cancelled request; the others lose no token."""
    (sequence, cancelled), (_, other) = submit(engine, [1]), submit(engine, [11])

    def park(ids: list[int]) -> None:
        if 1 in ids:
            engine.cancel(sequence)
            hop.step.check()  # as a parked hop does
            raise AssertionError("the check did not notice")

    model.before = park
    finish(engine)
    assert isinstance(cancelled.end.error, Cancelled)
    assert other.tokens == [12, 13, 14]


def test_a_passed_deadline_ends_a_request_wherever_it_is(engine: Engine):
    """Running and waiting requests end with DeadlineExceeded, and their slots are free."""
    _, late = submit(engine, [1], deadline=Deadline.after(0.0))
    finish(engine)
    assert isinstance(late.end.error, DeadlineExceeded)
    assert late.tokens == []
    assert engine.load.running == 0


def test_a_resumed_request_continues_after_its_tokens(engine: Engine, model: CountingModel):
    """Tokens that another router has sent are prefilled and counted, and are not sent again."""
    listener = Listener()
    resumed = Sequence("r", [1, 2, 3], 1, Sampling(max_tokens=4), frozenset(), listener)
    engine.submit(resumed)
    finish(engine)
    assert model.steps[0] == [1, 2, 3]
    assert (listener.tokens, listener.end.finish) == ([4, 5], FinishReason.LENGTH)


def test_a_full_queue_and_an_impossible_request_are_refused(engine: Engine):
    """The errors name the bound of the queue or of the cache, and accepted requests run."""
    with pytest.raises(InvalidRequest, match=r"prompt \+ max_tokens = 101: must be at most 100.*kv_memory"):
        submit(engine, [1], max_tokens=100)
    accepted = [submit(engine, [1])[1] for _ in range(7)]  # four take slots, three wait
    with pytest.raises(ResourceExhausted, match="3 of at most 3 requests"):
        submit(engine, [1])
    engine.step()
    with pytest.raises(ResourceExhausted, match="3 of at most 3 requests"):
        submit(engine, [1])
    finish(engine)
    assert [listener.tokens for listener in accepted] == [[2, 3, 4]] * 7


def test_a_bug_in_a_step_ends_its_request_and_not_the_engine(engine: Engine, model: CountingModel, caplog):
    """The request at which the bug shows ends with an error that only the log explains. The thread continues."""

    def fail(ids: list[int]) -> None:
        if 11 in ids:
            raise KeyError("a secret")

    model.before = fail
    engine.start()
    spans = {first: FailingSpan() for first in (1, 11, 21)}
    listeners = {first: submit(engine, [first], span=span)[1] for first, span in spans.items()}
    assert all(listener.ended.wait(5) for listener in listeners.values())
    assert type(listeners[11].end.error) is MoietyError
    assert {first: span.errors for first, span in spans.items()} == {1: [], 11: [listeners[11].end.error], 21: []}
    assert str(listeners[11].end.error) == "the router failed to compute request 11; its log says why"
    assert [listeners[first].tokens for first in (1, 21)] == [[2, 3, 4], [22, 23, 24]]
    assert [(record.message, str(record.exc_info[1])) for record in caplog.records] == [
        ("request 11 failed: KeyError('a secret')", "'a secret'")
    ]
    _, after = submit(engine, [1])
    assert after.ended.wait(5)
    assert after.tokens == [2, 3, 4]
    assert engine.alive


def test_a_bug_in_every_pass_ends_every_request_of_the_step(engine: Engine, model: CountingModel):
    """No request is left, and the next one is served."""
    model.before = lambda _: {}["a bug"]
    listeners = [submit(engine, [first])[1] for first in (1, 11, 21)]
    engine.step()
    assert all(type(listener.end.error) is MoietyError for listener in listeners)
    finish(engine)
    model.before = lambda _: None
    _, after = submit(engine, [1])
    finish(engine)
    assert after.tokens == [2, 3, 4]


@pytest.mark.parametrize("phase", ["admission", "plan", "commit"])
def test_a_bug_in_scheduling_ends_the_request_it_is_for(phase: str, monkeypatch: pytest.MonkeyPatch):
    """A request that cannot be admitted, planned or committed ends, with nothing of it left. The others get their tokens."""
    model = CountingModel()
    engine = engine_of(model, speculative_tokens=2)
    draft = Drafter.draft

    def fail(drafter: Drafter, tokens: list[int], most: int) -> tuple[int, ...]:
        if phase == "plan" and 11 in tokens:
            raise KeyError("a secret")
        return draft(drafter, tokens, most)

    monkeypatch.setattr(Drafter, "draft", fail)
    _, first = submit(engine, [1] * 4)
    engine.step()
    # Tokens that are not numbers of 32 bits have no digest. With prompt_logprobs none is needed before the commit.
    broken_prompt = [11] * 5 if phase == "plan" else [-11] * 5
    sampling = Sampling(max_tokens=8, prompt_logprobs=phase == "commit")
    _, broken = submit(engine, broken_prompt, sampling=sampling)
    _, last = submit(engine, [21] * 4)
    finish(engine)
    assert type(broken.end.error) is MoietyError
    assert "the router failed to compute request" in str(broken.end.error)
    assert len(broken.tokens) == (phase == "plan")
    assert (first.tokens, last.tokens) == ([2, 3, 4], [22, 23, 24])


def test_a_bug_in_log_probabilities_ends_their_request_alone(engine: Engine):
    """The client is told what failed, not how. The others of the step get their tokens."""
    sampling = Sampling(max_tokens=3, prompt_logprobs=True)
    _, broken = submit(engine, [40] * 3, sampling=sampling)  # the service would refuse tokens beyond the vocabulary
    _, other = submit(engine, [1] * 4)
    finish(engine)
    assert str(broken.end.error) == "the prompt's log probabilities failed; the router's log says why"
    assert broken.tokens == []
    assert other.tokens == [2, 3, 4]


@pytest.mark.parametrize("lasting", [True, False], ids=["none can be sent", "the error can be sent"])
def test_a_request_whose_events_cannot_be_sent_ends(engine: Engine, lasting: bool):
    """Its client gets an error if that can be sent. The others of its step get their tokens, and nothing of it is left."""
    sequence, listener = submit(engine, [1], max_tokens=50)

    def broken(emitted: Emitted) -> None:
        if lasting or emitted.error is None:
            raise RuntimeError("a secret")
        listener(emitted)

    sequence.emit = broken
    _, other = submit(engine, [11])
    engine.step()
    assert engine.load.running == 1
    finish(engine)
    assert other.tokens == [12, 13, 14]
    assert lasting or str(listener.end.error) == "the router failed to compute request 1; its log says why"


def test_stopping_ends_what_runs_with_unavailable(engine: Engine, model: CountingModel, hop: NoHop):
    """Running requests end with Unavailable, so that a gateway resumes them elsewhere. No new request is accepted."""
    stepping, stopped = threading.Event(), threading.Event()

    def hold(_ids: list[int]) -> None:
        stepping.set()
        stopped.wait(5)
        hop.step.check()

    model.before = hold
    engine.start()
    _, running = submit(engine, [1])
    assert stepping.wait(5)
    engine.stop(0.0)
    with pytest.raises(Unavailable, match="shutting down"):
        submit(engine, [2])
    stopped.set()
    assert running.ended.wait(5)
    assert isinstance(running.end.error, Unavailable)
    engine.stop(5)
    assert not engine.alive
