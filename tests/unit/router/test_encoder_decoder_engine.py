"""The engine with a small encoder-decoder: prompts are encoded whole, cached beside outputs and freed with them."""

from __future__ import annotations

from collections import abc

import pytest
import torch
from engine_support import START, Listener, TranslatingModel, engine_of, expected_translation, finish, submit

from moiety.core.sampling import Sampling
from moiety.errors import Cancelled, HopFailed, InvalidRequest, NoHolder
from moiety.router.engine import Engine
from moiety.router.sequence.sequence import Sequence

PROMPTS = ([2] * 3, list(range(3, 20)), [21, 22, 21, 22, 21], [11] * 9)
NEW_TOKENS = 7


def ask(
    engine: Engine, prompt: abc.Sequence[int], output: abc.Sequence[int] = (), n: int = 1, new_tokens: int = NEW_TOKENS
) -> tuple[Sequence, Listener]:
    """Submits a request to translate `prompt`, whose tokens `output` exist already."""
    sampling = Sampling(new_tokens, ignore_eos=True, n=n)
    request, listener = submit(engine, [START], sampling=sampling, encoder_ids=tuple(prompt))
    request.tokens += output
    return request, listener


def test_prompts_together_give_what_each_gives_alone():
    """Each output depends only on its own prompt and itself, and every prompt is encoded once, in one piece."""
    model = TranslatingModel()
    engine = engine_of(model, cross_attention=True)
    listeners = [ask(engine, prompt)[1] for prompt in PROMPTS]
    finish(engine)
    assert [listener.tokens for listener in listeners] == [
        expected_translation(prompt, NEW_TOKENS) for prompt in PROMPTS
    ]
    assert sorted(length for step in model.encoded for length in step) == sorted(map(len, PROMPTS))
    engine.stop(5)


def test_a_prompt_beyond_the_budget_is_encoded_by_itself():
    """A long prompt is encoded in one piece, one per step, and running streams still get a token each step."""
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
    """A preempted sequence frees its prompt's blocks too. After encoding again its output continues unchanged."""
    model = TranslatingModel()
    engine = engine_of(model, cross_attention=True, blocks=12)
    listeners = [ask(engine, prompt, new_tokens=20)[1] for prompt in PROMPTS]
    finish(engine)
    assert [listener.tokens for listener in listeners] == [expected_translation(prompt, 20) for prompt in PROMPTS]
    assert sum(map(len, model.encoded)) > len(PROMPTS), "no sequence was preempted: the test tests nothing"
    engine.stop(5)


def test_choices_share_their_prompt():
    """n choices share one encoded prompt in one set of blocks, which is freed when all have ended."""
    model = TranslatingModel()
    engine = engine_of(model, cross_attention=True)
    _, listener = ask(engine, PROMPTS[1], n=3)
    engine.step()
    engine.step()
    assert engine.blocks - engine.load.free_blocks == 5 + 3, "five blocks for the prompt, one for each output"
    finish(engine)
    assert listener.choices == dict.fromkeys(range(3), expected_translation(PROMPTS[1], NEW_TOKENS))
    assert sum(map(len, model.encoded)) == 1
    engine.stop(5)


def test_lost_experts_end_only_the_request_that_needs_them():
    """The step runs again without the sequence whose prompt could not be encoded; the others' tokens are unchanged."""
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
    assert [listeners[n].tokens for n in kept] == [expected_translation(PROMPTS[n], NEW_TOKENS) for n in kept]
    engine.stop(5)


def test_a_cancelled_request_frees_its_prompt():
    """After the next step a cancelled request holds no blocks, neither for its output nor for its prompt."""
    engine = engine_of(TranslatingModel(), cross_attention=True)
    request, listener = ask(engine, PROMPTS[1])
    engine.step()
    engine.cancel(request)
    engine.step()
    assert isinstance(listener.end.error, Cancelled)
    assert engine.load.free_blocks == engine.blocks
    engine.check_integrity()
    engine.stop(5)


def test_an_output_is_resumed_after_its_tokens():
    """Another router encodes the prompt again and continues after the tokens that were sent."""
    engine = engine_of(TranslatingModel(), cross_attention=True)
    whole = expected_translation(PROMPTS[3], NEW_TOKENS)
    _, listener = ask(engine, PROMPTS[3], whole[:4])
    finish(engine)
    assert listener.tokens == whole[4:]
    engine.stop(5)


def test_equal_outputs_of_other_prompts_share_nothing():
    """Cached values of output tokens depend on the prompt, so equal outputs must not share prefixes."""
    engine = engine_of(TranslatingModel(), cross_attention=True)
    output = [4] * 6
    for prompt in PROMPTS:
        _, listener = ask(engine, prompt, output)
        finish(engine)
        assert listener.tokens == expected_translation(prompt, NEW_TOKENS - len(output), output)
        assert listener.cached_tokens == {0: 0}
    engine.stop(5)


def test_prompt_and_output_must_fit_the_cache_together():
    """A request that can never run is refused at once; the error names prompt and max_tokens."""
    engine = engine_of(TranslatingModel(), cross_attention=True, blocks=6)
    with pytest.raises(InvalidRequest, match=r"prompt \+ max_tokens = 28: must be at most 24"):
        ask(engine, [3] * 20)
    engine.stop(5)


def test_a_given_first_token_is_the_first():
    """A given first token, such as a target language, comes first whatever the logits are; later tokens depend on it."""
    engine = engine_of(TranslatingModel(), cross_attention=True)
    sampling = Sampling(NEW_TOKENS, ignore_eos=True, first_token_id=21, temperature=1.5, seed=3)
    _, drawn = submit(engine, [START], sampling=sampling, encoder_ids=tuple(PROMPTS[0]))
    _, greedy = submit(
        engine, [START], sampling=Sampling(4, ignore_eos=True, first_token_id=21), encoder_ids=tuple(PROMPTS[0])
    )
    finish(engine)
    assert drawn.tokens[0] == 21
    assert greedy.tokens == [21, *expected_translation(PROMPTS[0], 3, [21])]
    engine.stop(5)


def test_a_long_prompt_is_encoded_with_all_threads():
    """A step that encodes many tokens uses all of the engine's threads in torch, and a step of few tokens only one."""
    model, threads = TranslatingModel(), list[int]()
    model.before = lambda _: threads.append(torch.get_num_threads())
    engine = engine_of(model, cross_attention=True, token_budget=200, blocks=100, threads=2)
    engine.start()
    _, listener = ask(engine, [3] * 100)
    assert listener.ended.wait(10)
    engine.stop(5)
    assert threads == [2] + [1] * (NEW_TOKENS - 1)
