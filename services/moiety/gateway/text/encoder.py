"""Tokenises prompts: beside the event loop, within a budget, and no further than the context that a prompt must fit into."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from moiety.errors import InvalidRequest, ResourceExhausted
from moiety.gateway.text.tokenizer import Tokenizer

SHORT = 1 << 13  # characters: some 5 ms of tokenising, on the event loop
THREADS = 2  # so that one long prompt does not hold up all others
# Characters that wait or are being tokenised, of all prompts. A tokenizer takes up to 170 bytes for each.
MOST_CHARACTERS = 8 << 20
RETRY_S = 1.0
PREFIX = 8  # characters per token of context. Text has 3 to 6 characters per token, so a longer text rarely fits.
MARGIN = 256  # tokens. A text that is cut may have some more than it has uncut: WordPiece has up to 100 for one unknown word.


class PromptEncoder:
    """Tokenises prompts for one gateway. Used on its event loop only."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="tokenizer")
        self._characters = 0  # that wait or are being tokenised

    async def encode(self, text: str, max_context: int, *, begin: bool = True) -> list[int]:
        """Returns the token ids of a prompt; of one that is far too long for the context, those of its beginning.

        `begin`: see Tokenizer.encode.

        Raises InvalidRequest if the text is empty or cannot fit into `max_context` tokens, ResourceExhausted if other
        prompts take all of the budget. A caller that is cancelled leaves no work behind, except for the part of a text that
        is being tokenised.
        """
        if not text:
            raise InvalidRequest("prompt.text", text, "at least one character")
        longest = self._tokenizer.longest_token
        most = min(max_context * longest, MOST_CHARACTERS)
        if len(text) > most:
            why = f"a context of {max_context} tokens of at most {longest} characters"
            bound = f"at most {most} characters" + (f", {why}" if most < MOST_CHARACTERS else "")
            raise InvalidRequest("prompt.text", f"{len(text)} characters", bound)
        if len(text) <= SHORT:
            return self._tokenizer.encode(text, begin=begin)
        if self._characters + len(text) > MOST_CHARACTERS:
            problem = f"prompts of {self._characters} characters are being tokenised, at most {MOST_CHARACTERS} may be"
            raise ResourceExhausted(problem, RETRY_S)
        self._characters += len(text)
        left = threading.Event()
        work = self._threads.submit(self._encode, text, max_context, begin, left)
        work.add_done_callback(partial(self._done, asyncio.get_running_loop(), len(text)))
        try:
            return await asyncio.wrap_future(work)
        finally:
            left.set()

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _encode(self, text: str, max_context: int, begin: bool, left: threading.Event) -> list[int]:
        """Tokenises the beginning of a long text first; all of it only if it may fit."""
        if len(text) > PREFIX * max_context:
            ids = self._tokenizer.encode(text[: PREFIX * max_context], begin=begin)
            if len(ids) >= max_context + MARGIN or left.is_set():
                return ids
        return self._tokenizer.encode(text, begin=begin)

    def _done(self, loop: asyncio.AbstractEventLoop, characters: int, _: Future[list[int]]) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(self._release, characters)

    def _release(self, characters: int) -> None:
        self._characters -= characters
