"""The engine around an encoder-decoder of numbers: prompts are encoded whole, kept beside outputs, and given up with them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from engine_support import START, Listener, TranslatingModel, engine_of, finish, submit, translated

from moiety.core.sampling import Sampling
from moiety.errors import Cancelled, HopFailed, InvalidRequest, NoHolder
from moiety.router.engine import Engine
from moiety.router.sequence.sequence import Sequence as Request

PROMPTS = ([2] * 3, list(range(3, 20)), [21, 22, 21, 22, 21], [11] * 9)
NEW_TOKENS = 7


def ask(
    engine: Engine, prompt: Sequence[int], output: Sequence[int] = (), n: int = 1, new_tokens: int = NEW_TOKENS
) -> tuple[Request, Listener]:
    """A request to translate `prompt`, of which `output` was made already."""
    sampling = Sampling(new_tokens, ignore_eos=True, n=n)
    request, listener = submit(engine, [START], sampling=sampling, encoder_ids=tuple(prompt))
    request.tokens += output
    return request, listener


def test_prompts_together_give_what_each_gives_alone():
    """Each output follows from its own prompt and itself; every prompt is encoded once, whole."""
    model = TranslatingModel()
    engine = engine_of(model, cross_attention=True)
    listeners = [ask(engine, prompt)[1] for prompt in PROMPTS]
    finish(engine)
    assert [listener.tokens for listener in listeners] == [translated(prompt, NEW_TOKENS) for prompt in PROMPTS]
    assert sorted(length for step in model.encoded for length in step) == sorted(map(len, PROMPTS))
    engine.stop(5)


def test_a_prompt_beyond_the_budget_is_encoded_by_itself():
    """It goes in one piece, one such prompt a step, and streams that run lose no step over it."""
    model = TranslatingModel()
    engine = engine_of(model, cross_attention=True, token_budget=6)
    _, running = ask(engine, [5, 6])
    engine.step()
    for prompt in ([9] * 17, [8] * 15):
        ask(engine, prompt)
    engine.step()
    engine.step()
    assert model.encoded == [(2,), (17,), (15,)]
    assert [len(step) for step in model.steps] == [1, 2, 3]
    assert len(running.tokens) == 3
    finish(engine)
    engine.stop(5)


def test_out_of_blocks_a_prompt_is_encoded_again():
    """Who has to give its blocks back gives its prompt's too; encoded anew, its output goes on as if nothing had been."""
    model = TranslatingModel()
    engine = engine_of(model, cross_attention=True, blocks=12)
    listeners = [ask(engine, prompt, new_tokens=20)[1] for prompt in PROMPTS]
    finish(engine)
    assert [listener.tokens for listener in listeners] == [translated(prompt, 20) for prompt in PROMPTS]
    assert sum(map(len, model.encoded)) > len(PROMPTS), "somebody was preempted"
    engine.stop(5)


def test_choices_share_their_prompt():
    """n choices have one encoded prompt, in one set of blocks; each ends, and gives its share back."""
    model = TranslatingModel()
    engine = engine_of(model, cross_attention=True)
    _, listener = ask(engine, PROMPTS[1], n=3)
    engine.step()
    engine.step()
    assert engine.blocks - engine.load.free_blocks == 5 + 3, "five blocks of the prompt, one of each output"
    finish(engine)
    assert listener.choices == dict.fromkeys(range(3), translated(PROMPTS[1], NEW_TOKENS))
    assert sum(map(len, model.encoded)) == 1
    engine.stop(5)


def test_lost_experts_end_only_the_request_that_needs_them():
    """The step runs again without the sequence whose prompt could not be encoded; the others' tokens are theirs."""
    model = TranslatingModel()
    engine = engine_of(model, cross_attention=True, token_budget=100)
    listeners = [ask(engine, prompt)[1] for prompt in PROMPTS]

    def lose(ids: list[int]) -> None:
        if 21 in ids:
            raise HopFailed([2], NoHolder(0, [3], 30.0))

    model.before = lose
    finish(engine)
    assert isinstance(listeners[2].end.error, NoHolder)
    kept = [n for n in range(len(PROMPTS)) if n != 2]
    assert [listeners[n].tokens for n in kept] == [translated(PROMPTS[n], NEW_TOKENS) for n in kept]
    engine.stop(5)


def test_a_cancelled_request_gives_its_prompt_back():
    """At the next step nothing of it is held, neither its output's blocks nor its prompt's."""
    engine = engine_of(TranslatingModel(), cross_attention=True)
    request, listener = ask(engine, PROMPTS[1])
    engine.step()
    engine.cancel(request)
    engine.step()
    assert isinstance(listener.end.error, Cancelled)
    assert engine.load.free_blocks == engine.blocks
    engine.check_integrity()
    engine.stop(5)


def test_an_output_is_resumed_behind_its_tokens():
    """Another router encodes the prompt again and goes on behind what was sent."""
    engine = engine_of(TranslatingModel(), cross_attention=True)
    whole = translated(PROMPTS[3], NEW_TOKENS)
    _, listener = ask(engine, PROMPTS[3], whole[:4])
    finish(engine)
    assert listener.tokens == whole[4:]
    engine.stop(5)


def test_equal_outputs_of_other_prompts_share_nothing():
    """What lies behind an output's tokens depends on its prompt: no prefix is ever found again."""
    engine = engine_of(TranslatingModel(), cross_attention=True)
    output = [4] * 6
    for prompt in PROMPTS:
        _, listener = ask(engine, prompt, output)
        finish(engine)
        assert listener.tokens == translated(prompt, NEW_TOKENS - len(output), output)
        assert listener.cached_tokens == {0: 0}
    engine.stop(5)


def test_prompt_and_output_must_fit_the_cache_together():
    """What can never run is refused at once, naming both."""
    engine = engine_of(TranslatingModel(), cross_attention=True, blocks=6)
    with pytest.raises(InvalidRequest, match=r"prompt \+ max_tokens = 28: must be at most 24"):
        ask(engine, [3] * 20)
    engine.stop(5)


def test_a_given_first_token_is_the_first():
    """Whatever the logits say: a target language, say. What follows follows from it."""
    engine = engine_of(TranslatingModel(), cross_attention=True)
    sampling = Sampling(NEW_TOKENS, ignore_eos=True, first_token_id=21, temperature=1.5, seed=3)
    _, drawn = submit(engine, [START], sampling=sampling, encoder_ids=tuple(PROMPTS[0]))
    _, greedy = submit(
        engine, [START], sampling=Sampling(4, ignore_eos=True, first_token_id=21), encoder_ids=tuple(PROMPTS[0])
    )
    finish(engine)
    assert drawn.tokens[0] == 21
    assert greedy.tokens == [21, *translated(PROMPTS[0], 3, [21])]
    engine.stop(5)
