"""POST /v1/completions: prompts in each form, choices, echo, log probabilities, streams."""

from __future__ import annotations

from gateway_support import PROMPT, SHAPE, expected

from moiety.gateway.text.tokenizer import Tokenizer
from moiety.testing import FakeEngine, fake_shape, fake_token
from support.doors import door_over

PATH = "/v1/completions"


def engine() -> FakeEngine:
    """A router."""
    return FakeEngine("a", SHAPE)


async def test_an_answer_has_the_form_of_openai(tokenizer: Tokenizer):
    """Ids, names, counts and the end are there, and the tokens are those of the engine."""
    async with door_over(tokenizer, engine()) as door:
        answer = await door.post(PATH, model="fake", prompt=PROMPT, max_tokens=6, seed=0, return_token_ids=True)
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["model"] == "fake"
    assert answer["system_fingerprint"].startswith("fp_")
    (choice,) = answer["choices"]
    assert choice["token_ids"] == expected(6)
    assert choice["prompt_token_ids"] == PROMPT
    assert choice["text"] == tokenizer.decode(expected(6))
    assert (choice["finish_reason"], choice["logprobs"], choice["stop_reason"]) == ("length", None, None)
    assert answer["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 6,
        "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_the_default_length_is_that_of_openai(tokenizer: Tokenizer):
    """Without max_tokens a completion has 16 tokens."""
    async with door_over(tokenizer, engine()) as door:
        answer = await door.post(PATH, prompt=PROMPT)
    assert answer["usage"]["completion_tokens"] == 16


async def test_several_prompts_with_several_choices_are_numbered_in_order(tokenizer: Tokenizer):
    """The choices of prompt i have the indexes i * n to i * n + n - 1, in a whole answer and in a stream."""
    prompts = [PROMPT, [9, 10], [11, 12, 13, 14]]
    wanted = [
        tokenizer.decode([fake_token(prompt, 0, position, SHAPE.vocabulary, choice) for position in range(4)])
        for prompt in prompts
        for choice in range(2)
    ]
    asked = {"prompt": prompts, "n": 2, "max_tokens": 4, "seed": 0}
    async with door_over(tokenizer, engine()) as door:
        whole = await door.post(PATH, **asked)
        events = await door.events(PATH, **asked)
        texts = await door.post(PATH, **{**asked, "prompt": ["one", "two"], "n": 1})
    assert [choice["index"] for choice in whole["choices"]] == [*range(6)]
    assert [choice["text"] for choice in whole["choices"]] == wanted
    assert whole["usage"]["prompt_tokens"] == 9
    streamed = [""] * 6
    for event in events:
        (choice,) = event["choices"]
        streamed[choice["index"]] += choice["text"]
    assert streamed == wanted
    assert len(texts["choices"]) == 2


async def test_more_prompts_than_places_are_computed_in_turn(tokenizer: Tokenizer):
    """64 prompts are accepted by a gateway with 16 places, and one more prompt is refused."""
    async with door_over(tokenizer, engine(), max_concurrent=16) as door:
        answer = await door.post(PATH, prompt=[PROMPT] * 64, max_tokens=2)
        error = await door.refused(PATH, 400, prompt=[PROMPT] * 65, max_tokens=2)
    assert len(answer["choices"]) == 64
    assert error["param"] == "prompt"


async def test_echo_scores_a_prompt_without_generating(tokenizer: Tokenizer):
    """With max_tokens 0 the text is the prompt, and log probabilities are those of its tokens: what lm-eval asks for."""
    ids = tokenizer.encode("hello there")
    asked = {"prompt": "hello there", "echo": True, "logprobs": 2, "seed": 0}
    async with door_over(tokenizer, engine()) as door:
        scored = await door.post(PATH, max_tokens=0, **asked)
        one_more = await door.post(PATH, max_tokens=1, **asked)
        chosen = await door.post(PATH, max_tokens=1, **{**asked, "logprobs": 0})
    (choice,) = scored["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("hello there", "length")
    assert scored["usage"]["completion_tokens"] == 0
    logprobs = choice["logprobs"]
    names = [tokenizer.token(token).text for token in ids]
    assert logprobs["tokens"] == names
    assert logprobs["token_logprobs"] == [None, *[-1.0] * (len(ids) - 1)]
    assert logprobs["top_logprobs"][0] is None
    assert all(len(top) == 3 and name in top for top, name in zip(logprobs["top_logprobs"][1:], names[1:], strict=True))
    offsets = [len("".join(names[:place])) for place in range(len(names))]
    assert logprobs["text_offset"] == offsets
    more = one_more["choices"][0]["logprobs"]
    assert [len(values) for values in more.values()] == [len(ids) + 1] * 4
    assert all(len(top) == 1 for top in chosen["choices"][0]["logprobs"]["top_logprobs"][1:])


async def test_a_stream_echoes_each_prompt_once(tokenizer: Tokenizer):
    """The first chunk of every choice begins with the prompt, with its log probabilities."""
    async with door_over(tokenizer, engine()) as door:
        events = await door.events(PATH, prompt="hello", n=2, max_tokens=3, echo=True, logprobs=1, seed=0)
    for index in range(2):
        parts = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert parts[0]["text"].startswith("hello")
        assert not any("hello" in part["text"] for part in parts[1:])
        assert sum(len(part["logprobs"]["tokens"]) for part in parts) == len(tokenizer.encode("hello")) + 3


async def test_a_stream_ends_with_the_counts_that_are_asked_for(tokenizer: Tokenizer):
    """include_usage adds a last chunk without choices; continuous_usage_stats counts in every chunk."""
    async with door_over(tokenizer, engine()) as door:
        plain = await door.events(PATH, prompt=PROMPT, max_tokens=4, seed=0)
        counted = await door.events(PATH, prompt=PROMPT, max_tokens=4, seed=0, stream_options={"include_usage": True})
        options = {"include_usage": True, "continuous_usage_stats": True}
        always = await door.events(PATH, prompt=PROMPT, max_tokens=4, seed=0, stream_options=options)
    assert all("usage" not in event for event in plain)
    assert [event["usage"] for event in counted[:-1]] == [None] * (len(counted) - 1)
    assert counted[-1]["choices"] == []
    assert counted[-1]["usage"]["completion_tokens"] == 4
    assert {event["id"] for event in counted} == {counted[0]["id"]}
    so_far = [event["usage"]["completion_tokens"] for event in always]
    assert so_far == sorted(so_far)
    assert so_far[-1] == 4


async def test_a_choice_names_the_stop_that_ended_it(tokenizer: Tokenizer):
    """finish_reason is stop, stop_reason the string, and the text ends before it."""
    async with door_over(tokenizer, engine()) as door:
        whole = (await door.post(PATH, prompt=PROMPT, max_tokens=8, seed=0))["choices"][0]["text"]
        stop = whole[3:5]
        stopped = (await door.post(PATH, prompt=PROMPT, max_tokens=8, seed=0, stop=[stop]))["choices"][0]
        events = await door.events(PATH, prompt=PROMPT, max_tokens=8, seed=0, stop=stop)
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", stop)
    assert stopped["text"] == whole[: whole.index(stop)]
    assert "".join(event["choices"][0]["text"] for event in events) == stopped["text"]
    assert events[-1]["choices"][0]["stop_reason"] == stop


async def test_every_sampling_field_reaches_the_router(tokenizer: Tokenizer):
    """Fields of OpenAI and of vLLM arrive as sampling parameters."""
    router = engine()
    given = {
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 7,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "min_tokens": 2,
        "n": 2,
    }
    async with door_over(tokenizer, router) as door:
        await door.post(
            PATH,
            prompt=PROMPT,
            max_tokens=4,
            seed=-1,
            logit_bias={"5": -100},
            stop_token_ids=[9],
            ignore_eos=True,
            priority=-3,
            user="someone",
            **given,
        )
        await door.post(PATH, prompt=PROMPT, max_tokens=4, top_k=-1)
    first, second = router.requests
    assert {name: getattr(first.sampling, name) for name in given} == given
    assert first.sampling.seed == (1 << 64) - 1
    assert dict(first.sampling.logit_bias) == {5: -100.0}
    assert (list(first.sampling.stop_token_ids), first.sampling.ignore_eos) == ([9], True)
    assert (first.priority, first.tenant) == (-3, "someone")
    assert (second.sampling.top_k, second.sampling.temperature) == (0, 1.0)


async def test_tokens_can_be_named_by_their_ids(tokenizer: Tokenizer):
    """return_tokens_as_token_ids names tokens as token_id:5."""
    async with door_over(tokenizer, engine()) as door:
        asked = {"prompt": PROMPT, "max_tokens": 2, "seed": 0, "logprobs": 1}
        answer = await door.post(PATH, return_tokens_as_token_ids=True, **asked)
    assert answer["choices"][0]["logprobs"]["tokens"] == [f"token_id:{token}" for token in expected(2)]


async def test_tokens_that_only_pad_the_vocabulary_have_no_text(tokenizer: Tokenizer):
    """A model may have more ids than its tokenizer: log probabilities show these as empty."""
    router = FakeEngine("a", fake_shape(max_context=64, vocabulary=400))
    router.script = [350, 5]
    async with door_over(tokenizer, router) as door:
        answer = await door.post(PATH, prompt=PROMPT, max_tokens=2, logprobs=1)
    assert answer["choices"][0]["logprobs"]["tokens"] == ["", tokenizer.token(5).text]
