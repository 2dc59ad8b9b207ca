"""The generation core, without any transport: what its deltas say besides text and tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gateway_support import PROMPT, SHAPE, expected, gateway_over

from moiety.core.sampling import FinishReason
from moiety.core.sampling_options import SamplingOptions
from moiety.errors import InvalidRequest, NotFound
from moiety.gateway.core import GenerationCore
from moiety.gateway.request import Conversation, Delta, GenerationRequest
from moiety.gateway.text.tokenizer import Tokenizer
from moiety.synthetic.tokenizer import write_sentencepiece_tokenizer, write_tokenizer
from moiety.testing import FakeEngine
from moiety.wire.deadline import Deadline


def options(**given: object) -> SamplingOptions:
    """Returns options with a seed and six tokens, and what is given."""
    return SamplingOptions(**{"max_tokens": 6, "seed": 0, **given})  # type: ignore[arg-type]


async def deltas(core: GenerationCore, sampling: SamplingOptions, **given: object) -> list[Delta]:
    """Sends one request of PROMPT; returns all its deltas."""
    request = GenerationRequest(**{"prompt": PROMPT, "sampling": sampling, **given})  # type: ignore[arg-type]
    return [delta async for delta in core.generate(request, Deadline())]


async def test_the_first_delta_has_the_prompt_and_the_last_one_the_counts(tokenizer: Tokenizer):
    """Prompt ids come once, usage and timings on the last delta of the last choice; the times add up to less than the wait."""
    async with gateway_over(tokenizer, FakeEngine("a", SHAPE)) as gateway:
        got = await deltas(gateway.core, options(n=2))
    assert [list(delta.prompt_ids) for delta in got] == [PROMPT] + [[]] * (len(got) - 1)
    assert [delta.usage is not None for delta in got] == [False] * (len(got) - 1) + [True]
    last = got[-1]
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (len(PROMPT), 12)
    assert last.timings is not None
    assert all(0 <= took < 30 for took in (last.timings.queued_s, last.timings.prefill_s, last.timings.decode_s))


async def test_a_choice_names_what_stopped_it(tokenizer: Tokenizer):
    """A stop string, or a stop token of the request, is named; the end by length is not."""
    tokens = expected(6)
    async with gateway_over(tokenizer, FakeEngine("a", SHAPE)) as gateway:
        text = "".join(delta.text for delta in await deltas(gateway.core, options()))
        by_length = (await deltas(gateway.core, options()))[-1]
        by_text = (await deltas(gateway.core, options(stop=(text[-2:],))))[-1]
    assert (by_length.finish, by_length.matched_stop) == (FinishReason.LENGTH, None)
    assert (by_text.finish, by_text.matched_stop) == (FinishReason.STOP, text[-2:])
    assert len(tokens) == 6


async def test_a_prompt_is_scored_with_its_likeliest_tokens(tokenizer: Tokenizer):
    """One list per prompt token but the first, each with as many tokens as asked for."""
    async with gateway_over(tokenizer, FakeEngine("a", SHAPE)) as gateway:
        got = await deltas(gateway.core, options(logprobs=True, top_logprobs=3, prompt_logprobs=True))
    (scored,) = [delta for delta in got if delta.prompt_logprobs]
    assert len(scored.prompt_logprobs) == len(PROMPT) - 1
    assert [len(top.token_ids) for top in scored.prompt_top_logprobs] == [3] * (len(PROMPT) - 1)
    assert all(len(delta.top_logprobs) == len(delta.token_ids) for delta in got)


async def test_the_default_length_may_be_the_rest_of_the_context(tokenizer: Tokenizer):
    """Without max_tokens an output has 128 tokens at most, or fills the context where that is asked for."""
    async with gateway_over(tokenizer, FakeEngine("a", SHAPE)) as gateway:
        got = await deltas(gateway.core, SamplingOptions(seed=0, default_max_tokens=None))
    assert got[-1].usage is not None
    assert got[-1].usage.completion_tokens == SHAPE.max_context - len(PROMPT)


async def test_a_wrong_model_and_a_conversation_without_a_template_are_refused(tokenizer: Tokenizer):
    """Each error names the field."""
    async with gateway_over(tokenizer, FakeEngine("a", SHAPE)) as gateway:
        with pytest.raises(NotFound, match="'other' is not served"):
            await deltas(gateway.core, options(), model="other")
        with pytest.raises(InvalidRequest, match="messages"):
            await deltas(gateway.core, options(), prompt=Conversation([{"role": "user", "content": "hi"}]))


def test_the_bytes_of_tokens_make_up_the_text(tokenizer: Tokenizer, tmp_path: Path):
    """The bytes of a text's tokens joined are the text, in byte-level BPE and in SentencePiece, also within characters."""
    write_sentencepiece_tokenizer(tmp_path)
    for each in (tokenizer, Tokenizer(str(tmp_path))):
        for text in ("one more", "é€ and 漢字", "a\n\tb"):
            joined = b"".join(each.token(token).bytes for token in each.encode(text, begin=False))
            assert joined.decode().removeprefix(" ") == text
    with pytest.raises(InvalidRequest, match="ids of this model's tokenizer"):
        tokenizer.token(10**6)


async def test_the_special_token_that_ends_an_output_is_no_text(tokenizer: Tokenizer):
    """Where special tokens are text, the end of sequence is not, and a stop token of the request that has text still is."""
    a, end = tokenizer.encode("a", begin=False)[0], tokenizer.stop_ids[0]
    router = FakeEngine("a", SHAPE)
    async with gateway_over(tokenizer, router) as gateway:
        for script, stops in (([a, a, end], ()), ([a, a, a], (a,))):
            router.script = script
            got = await deltas(gateway.core, options(stop_token_ids=stops), keep_special=True)
            assert "".join(delta.text for delta in got) == tokenizer.decode([t for t in script if t != end])
            assert got[-1].matched_stop == (a if stops else None)
            assert [token for delta in got for token in delta.token_ids] == script


async def test_a_text_with_a_token_beyond_the_models_vocabulary_is_refused(tmp_path: Path):
    """The error names the token, which was added to the tokenizer but not to the model."""
    write_tokenizer(tmp_path)
    form = json.loads((tmp_path / "tokenizer.json").read_text())
    form["added_tokens"].append({**form["added_tokens"][0], "id": SHAPE.vocabulary, "content": "[PAD]"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(form))
    async with gateway_over(Tokenizer(str(tmp_path)), FakeEngine("a", SHAPE)) as gateway:
        with pytest.raises(InvalidRequest, match=rf"'\[PAD\]': must be left out: it is token {SHAPE.vocabulary} of"):
            await deltas(gateway.core, options(), prompt="a[PAD]b")
