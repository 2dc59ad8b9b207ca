"""What tokenising prompts may cost: no more than the context allows, within a budget, and nothing for who has left."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from moiety.errors import InvalidRequest, ResourceExhausted
from moiety.gateway.text.encoder import SHORT, THREADS, PromptEncoder
from moiety.gateway.text.tokenizer import Tokenizer
from moiety.testing import eventually

CONTEXT = 1 << 12


class CountingTokenizer:
    """The tokenizer, which counts the characters that it is given and can be held up."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.longest_token = 100  # as of a published tokenizer; the tiny one's has fewer characters
        self.texts: list[int] = []  # characters of each text
        self.go_on = threading.Event()
        self.go_on.set()

    def encode(self, text: str, *, begin: bool = True) -> list[int]:
        """Returns the token ids once `go_on` is set."""
        self.texts.append(len(text))
        self.go_on.wait(20)
        return self._tokenizer.encode(text, begin=begin)


@pytest.fixture
def counting(tokenizer: Tokenizer) -> CountingTokenizer:
    """Returns a tokenizer that counts."""
    return CountingTokenizer(tokenizer)


@pytest.fixture
async def encoder(counting: CountingTokenizer) -> AsyncIterator[PromptEncoder]:
    """Returns an encoder over the counting tokenizer."""
    made = PromptEncoder(counting)  # type: ignore[arg-type]
    yield made
    counting.go_on.set()
    made.close()


async def test_long_and_short_prompts_get_their_ids(tokenizer: Tokenizer, encoder: PromptEncoder):
    """The ids are those of the tokenizer, on the loop and beside it."""
    for text in ("hello", "word " * SHORT):
        assert await encoder.encode(text, len(text)) == tokenizer.encode(text)


async def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised(
    encoder: PromptEncoder, counting: CountingTokenizer
):
    """A text longer than the context times the longest token is refused, with its length and the bound."""
    most = 100 * counting.longest_token
    with pytest.raises(InvalidRequest, match=rf"prompt.text = '{most + 1} characters': must be at most {most} charac"):
        await encoder.encode("x" * (most + 1), 100)
    with pytest.raises(InvalidRequest, match=r"prompt.text = '': must be at least one character"):
        await encoder.encode("", 100)
    assert not counting.texts


async def test_a_long_text_is_tokenised_no_further_than_the_context(
    encoder: PromptEncoder, counting: CountingTokenizer
):
    """Of a text that is many times too long, only the beginning is tokenised, which already has too many tokens."""
    ids = await encoder.encode("q7 " * (CONTEXT * 30), CONTEXT)
    assert len(ids) >= CONTEXT
    assert sum(counting.texts) <= 8 * CONTEXT < 90 * CONTEXT


async def test_prompts_share_a_budget_of_characters(
    encoder: PromptEncoder, counting: CountingTokenizer, monkeypatch: pytest.MonkeyPatch
):
    """A prompt beyond the budget is refused with a retry delay; a prompt that is done returns its part, and so does one
    whose client has left.
    """
    monkeypatch.setattr("moiety.gateway.text.encoder.MOST_CHARACTERS", 100_000)
    counting.go_on.clear()
    text = "x" * 40_000
    running = [asyncio.create_task(encoder.encode(text, CONTEXT * 10)) for _ in range(2)]
    await eventually(lambda: len(counting.texts) == 2)
    with pytest.raises(
        ResourceExhausted, match="prompts of 80000 characters are being tokenised, at most 100000 may be"
    ):
        await encoder.encode(text, CONTEXT * 10)
    running[0].cancel()
    counting.go_on.set()
    assert len(await running[1]) > 0
    assert len(await encoder.encode(text, CONTEXT * 10)) > 0


async def test_a_prompt_whose_client_has_left_is_not_tokenised(encoder: PromptEncoder, counting: CountingTokenizer):
    """What waits is dropped when its request is cancelled, and what runs stops at its next part."""
    counting.go_on.clear()
    text = "q7 " * (4 * CONTEXT)  # its beginning is tokenised first
    all_requests = [asyncio.create_task(encoder.encode(text, CONTEXT)) for _ in range(20)]
    await eventually(lambda: len(counting.texts) == THREADS)
    for request in all_requests:
        request.cancel()
    await asyncio.wait(all_requests)
    counting.go_on.set()
    assert await encoder.encode("y" * 2 * SHORT, CONTEXT * 10)
    assert len(counting.texts) == THREADS + 1
