"""Failures of one request: the other requests of its step get the tokens of running alone."""

from __future__ import annotations

from engine_support import RememberingModel, engine_of, expected_tokens, finish, greedy, prompt_of, submit

from moiety.errors import Cancelled, DeadlineExceeded, HopFailed, NoHolder
from moiety.router.sequence.guides import CompiledGuide, Matcher
from moiety.wire.deadline import Deadline


class UnreadableGuide(CompiledGuide):
    """A guide that fails when a sequence follows it."""

    def __init__(self) -> None: ...

    def matcher(self) -> Matcher:
        raise ValueError("no such file")


def test_what_fails_one_request_leaves_the_others_alone():
    """A sampling failure, a cancellation, a passed deadline and lost experts end four requests; the fifth finishes."""
    model = RememberingModel()
    engine = engine_of(model, slots=5, token_budget=40)
    prompts = {name: prompt_of(seed, 6) for seed, name in enumerate(["unsampled", "cancelled", "late", "lost", "well"])}
    requests = {name: submit(engine, prompt, sampling=greedy(10)) for name, prompt in prompts.items()}
    requests["unsampled"][0].guide = UnreadableGuide()

    def lose(ids: list[int]) -> None:
        if len(ids) == 2:
            raise HopFailed([0], NoHolder(0, [3], 30.0))

    engine.step()
    engine.cancel(requests["cancelled"][0])
    requests["late"][0].deadline = Deadline.after(0.0)
    model.before = lose
    finish(engine)
    ends = {name: listener.end for name, (_, listener) in requests.items()}
    assert str(ends["unsampled"].error) == "sampling failed; the router's log says why"
    assert isinstance(ends["cancelled"].error, Cancelled)
    assert isinstance(ends["lost"].error, NoHolder)
    assert requests["well"][1].tokens == expected_tokens(prompts["well"], 10)
    assert isinstance(ends["late"].error, DeadlineExceeded)


def test_blocks_of_a_step_that_failed_serve_when_it_runs_again():
    """When every twelfth forward pass fails for its first sequence, the others' tokens stay correct."""
    model = RememberingModel()
    engine = engine_of(model, slots=4, blocks=14)
    calls = 0

    def lose(_ids: list[int]) -> None:
        nonlocal calls
        calls += 1
        if calls % 12 == 0:
            raise HopFailed([0], NoHolder(0, [3], 30.0))

    model.before = lose
    prompts = [prompt_of(seed, 7) for seed in range(6)]
    listeners = [submit(engine, prompt, sampling=greedy(20))[1] for prompt in prompts]
    finish(engine)
    failed = [listener for listener in listeners if isinstance(listener.end.error, NoHolder)]
    assert 0 < len(failed) < len(listeners)
    for prompt, listener in zip(prompts, listeners, strict=True):
        assert listener.tokens == expected_tokens(prompt, 20)[: len(listener.tokens)]
        assert listener in failed or len(listener.tokens) == 20
