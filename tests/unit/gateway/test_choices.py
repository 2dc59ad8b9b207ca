"""Stop strings, several choices and their usage through a real gateway over fake engines, lost routers included."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from pathlib import Path

import pytest
from gateway_support import PROMPT, SHAPE, chunks, die_before, gateway_over

from moiety.client import Chunk
from moiety.core.sampling import FinishReason, Sampling
from moiety.errors import MoietyError
from moiety.gateway.outputs import Outputs
from moiety.gateway.text.tokenizer import Tokenizer
from moiety.internal.v1 import engine_pb2
from moiety.synthetic.tokenizer import write_sentencepiece_tokenizer
from moiety.testing import FakeEngine, eventually, fake_token

N, TOKENS = 3, 8


def engine(name: str) -> FakeEngine:
    """A ready router."""
    return FakeEngine(name, SHAPE)


def expected(choice: int, count: int = TOKENS) -> list[int]:
    """Returns the tokens of one choice of PROMPT, seed 0."""
    return [fake_token(PROMPT, 0, position, SHAPE.vocabulary, choice) for position in range(count)]


def by_choice(got: list[Chunk]) -> dict[int, list[int]]:
    """Returns choice -> token ids."""
    tokens: dict[int, list[int]] = defaultdict(list)
    for chunk in got:
        tokens[chunk.choice].extend(chunk.token_ids)
    return tokens


async def test_choices_stream_side_by_side(tokenizer: Tokenizer):
    """One engine request serves all choices; each has its own text and end, and the last message has the usage."""
    router = FakeEngine("a", SHAPE, blocks=8, block_tokens=2)
    async with gateway_over(tokenizer, router) as gateway:
        await chunks(gateway, max_tokens=1)
        got = await chunks(gateway, n=N, max_tokens=TOKENS, request_id="mine")
        assert len(router.requests) == 2
        assert by_choice(got) == {choice: expected(choice) for choice in range(N)}
        for choice in range(N):
            text = "".join(chunk.text for chunk in got if chunk.choice == choice)
            assert text == tokenizer.decode(expected(choice))
        assert [chunk.finish_reason for chunk in got] == [None] * N * (TOKENS - 1) + [FinishReason.LENGTH] * N
        assert [chunk.request_id for chunk in got] == ["mine"] + [""] * (N * TOKENS - 1)
        assert [chunk.completion_tokens for chunk in got[-2:]] == [0, N * TOKENS]
        assert (got[-1].prompt_tokens, got[-1].cached_tokens) == (len(PROMPT), 2)


@pytest.mark.parametrize("position", [0, 1, 5])  # before anything was sent; after the first tokens; later
async def test_a_lost_router_costs_no_choice_a_token(tokenizer: Tokenizer, position: int):
    """Choices resume in one request before their first token, each in a request of its own after it; no token is lost."""
    routers = engine("a"), engine("b")
    async with gateway_over(tokenizer, *routers) as gateway:
        die_before(gateway, position, *routers, choices=N)
        got = await chunks(gateway, n=N, max_tokens=TOKENS, logprobs=True, prompt_logprobs=True)
        assert by_choice(got) == {choice: expected(choice) for choice in range(N)}
        assert sum(len(chunk.prompt_logprobs) for chunk in got) == len(PROMPT) - 1, "sent once, despite the loss"
        assert got[-1].completion_tokens == N * TOKENS
        _, second = sorted(routers, key=lambda router: (len(router.requests), len(router.requests[-1].generated_ids)))
        resumed = {(r.choice, r.sampling.n, tuple(r.generated_ids)) for r in second.requests}
        alone = {(choice, 1, tuple(expected(choice, position))) for choice in range(N)}
        assert resumed == ({(0, N, ())} if position == 0 else alone)


async def test_a_resumed_choice_that_fails_ends_the_request(tokenizer: Tokenizer):
    """An error of one resumed choice ends the whole request, and no other choice keeps running."""
    first, second = engine("a"), engine("b")
    vanishing: list[asyncio.Task[None]] = []

    async def dies(at: int) -> None:
        if at == 2:
            vanishing.append(asyncio.create_task(first.vanish()))
            await asyncio.Event().wait()

    async def refuses(at: int) -> None:
        if at == 4:
            if len(second.requests) == N and second.requests[0].choice == 0:
                raise MoietyError("the step failed")
            await asyncio.Event().wait()

    async with gateway_over(tokenizer, first) as gateway:
        first.before_token, second.before_token = dies, refuses
        running = asyncio.create_task(chunks(gateway, n=N, max_tokens=TOKENS))
        await eventually(lambda: bool(first.requests))
        await second.start(gateway.registry)
        try:
            with pytest.raises(MoietyError, match="the step failed"):
                await running
            await eventually(lambda: gateway.core.running == 0)
        finally:
            await second.vanish()


def text_and_stop(tokenizer: Tokenizer, choice: int = 0, count: int = 40) -> tuple[str, str]:
    """Returns the text of a choice, and a piece of it that spans tokens."""
    text = tokenizer.decode(expected(choice, count))
    middle = len(text) // 2
    return text, text[middle : middle + 4]


async def test_a_stop_string_ends_the_output_before_it(tokenizer: Tokenizer):
    """A stop string that spans tokens ends the text with reason STOP and is not sent; the engine gets no stop strings."""
    router = engine("a")
    text, stop = text_and_stop(tokenizer)
    async with gateway_over(tokenizer, router) as gateway:
        got = await chunks(gateway, max_tokens=40, stop=[stop, "never to be found"])
        assert "".join(chunk.text for chunk in got) == text[: text.index(stop)]
        assert [chunk.finish_reason for chunk in got] == [None] * (len(got) - 1) + [FinishReason.STOP]
        assert got[-1].completion_tokens == len(by_choice(got)[0]) < 40
        assert not router.requests[0].sampling.stop, "the engine must not get stop strings"


async def test_the_engine_is_cancelled_when_every_choice_has_stopped(tokenizer: Tokenizer):
    """A stopped choice sends nothing more; when all have stopped, the request ends though the engine would go on."""
    router = engine("a")
    stops = [text_and_stop(tokenizer, choice)[1] for choice in range(2)]
    longest = 0
    for choice in range(2):
        text = tokenizer.decode(expected(choice, 40))
        first = min(text.index(stop) + len(stop) for stop in stops if stop in text)
        count = next(n for n in range(41) if len(tokenizer.decode(expected(choice, n))) >= first)
        longest = max(longest, count)

    async def hold(position: int) -> None:
        if position > longest + 1:
            await asyncio.Event().wait()

    async with gateway_over(tokenizer, router) as gateway:
        router.before_token = hold
        got = await chunks(gateway, n=2, max_tokens=40, stop=stops)
        assert [chunk.finish_reason for chunk in got if chunk.finish_reason] == [FinishReason.STOP] * 2
        for choice in range(2):
            of_choice = [chunk for chunk in got if chunk.choice == choice]
            assert [bool(chunk.finish_reason) for chunk in of_choice] == [False] * (len(of_choice) - 1) + [True]
        assert got[-1].completion_tokens == sum(map(len, by_choice(got).values()))


async def test_stop_strings_wait_for_min_tokens(tokenizer: Tokenizer):
    """The text of the first min_tokens tokens is not searched for stop strings."""
    text = tokenizer.decode(expected(0, 20))
    async with gateway_over(tokenizer, engine("a")) as gateway:
        every = sorted(set(text))[:16]
        got = await chunks(gateway, max_tokens=20, stop=every, min_tokens=10)
        assert len(by_choice(got)[0]) > 10
        got = await chunks(gateway, max_tokens=20, stop=every)
        assert len(by_choice(got)[0]) < 10


async def test_priority_and_tenant_reach_the_engine(tokenizer: Tokenizer):
    """The engine receives priority and tenant unchanged."""
    router = engine("a")
    async with gateway_over(tokenizer, router) as gateway:
        await chunks(gateway, max_tokens=1, priority=-3, tenant="blue")
        assert (router.requests[0].priority, router.requests[0].tenant) == (-3, "blue")


def outputs(tokenizer: Tokenizer, stop: str, continues: list[int], *, min_tokens: int = 0) -> Outputs:
    """Returns the outputs of a request with one stop string."""
    sampling = Sampling(max_tokens=99, min_tokens=min_tokens)
    return Outputs(
        PROMPT, sampling, [stop], tokenizer, special_stops={}, continues=continues, keep_special=False, arrived=0.0
    )


def answered(made: Outputs, ids: list[int], sizes: list[int]) -> tuple[str, bool]:
    """Returns the text of events with `ids` in portions of `sizes`, and whether a stop string ended it."""
    pieces, start = [], 0
    for size in sizes:
        event = engine_pb2.EngineEvent(token_ids=ids[start : start + size])
        if delta := made.push(event):
            pieces.append(delta.text)
        start += size
    return "".join(pieces), made.complete


@pytest.mark.parametrize("sizes", [[1] * 6, [6], [2, 4], [3, 3], [1, 4, 1]])
def test_stop_strings_are_found_in_the_decoded_text(tmp_path: Path, sizes: list[int]):
    """A stop string begins with the space that the text has after the prompt, however tokens arrive."""
    write_sentencepiece_tokenizer(tmp_path)
    tokenizer = Tokenizer(str(tmp_path))
    prompt, output = tokenizer.encode("Answer:"), tokenizer.encode("no more")[:6]
    assert answered(outputs(tokenizer, " no", prompt), output, sizes) == ("", True)
    assert answered(outputs(tokenizer, " no", []), output, sizes)[1] is False


@pytest.mark.parametrize("sizes", [[1] * 6, [6], [2, 4], [3, 3], [1, 4, 1]])
def test_min_tokens_counts_tokens_whose_text_is_held_back(tmp_path: Path, sizes: list[int]):
    """Text of the first min_tokens tokens is not searched for stop strings, also where later tokens complete it."""
    write_sentencepiece_tokenizer(tmp_path)
    tokenizer = Tokenizer(str(tmp_path))
    output = [*tokenizer.encode("éé")[-4:], *tokenizer.encode("x")]
    assert len(output) == 6, "each é must be two tokens, and x a space and a letter"
    assert answered(outputs(tokenizer, "é", PROMPT, min_tokens=2), output, sizes) == ("é", True)


@pytest.mark.parametrize("sizes", [[1] * 7, [7], [3, 4], [2, 1, 4]])
def test_min_tokens_may_end_inside_a_character(tmp_path: Path, sizes: list[int]):
    """A whole character of the exempt tokens stays exempt if they end with the first byte of another one."""
    write_sentencepiece_tokenizer(tmp_path)
    tokenizer = Tokenizer(str(tmp_path))
    output = [*tokenizer.encode("é")[-2:], *tokenizer.encode("€")[-3:], *tokenizer.encode("x")]
    assert answered(outputs(tokenizer, "é", PROMPT, min_tokens=3), output, sizes)[0].startswith("é€")
