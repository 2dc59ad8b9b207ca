"""Converts text to token ids and back. Only the gateway does so."""

from __future__ import annotations

from collections.abc import Sequence

from moiety.errors import InvalidRequest
from moiety.model.checkpoint.tokenizer import open_tokenizer

MAX_PROMPT_CHARACTERS = 16 << 20
CHARACTER_BYTES = 4  # the longest UTF-8 character, and so the most tokens that one character can be split into
PENDING_TOKENS = 3 * CHARACTER_BYTES
_PARTIAL = "\ufffd"  # what a decoder shows for the bytes of an unfinished character


class Tokenizer:
    """A checkpoint's tokenizer, and the ids that end its generations."""

    def __init__(self, folder: str):
        """Raises CheckpointError when the folder has no usable tokenizer."""
        self._tokenizer, self.stop_ids = open_tokenizer(folder)

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a prompt. Raises InvalidRequest when it is empty or has over MAX_PROMPT_CHARACTERS."""
        if not text:
            raise InvalidRequest("prompt.text", text, "at least one character")
        if len(text) > MAX_PROMPT_CHARACTERS:
            raise InvalidRequest(
                "prompt.text", f"{len(text)} characters", f"at most {MAX_PROMPT_CHARACTERS} characters"
            )
        ids: list[int] = self._tokenizer.encode(text)
        return ids

    def token_id(self, token: str) -> int:
        """Returns the id of the token whose text is exactly `token`. Raises InvalidRequest where there is none."""
        found = self._tokenizer.get_vocab().get(token)
        if found is None:
            raise InvalidRequest("sampling.first_token", token, "the text of a token of this model")
        return int(found)

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text


class Detokenizer:
    """Turns a stream of token ids into a stream of text; returns each character once it is complete.

    Decodes from a little before the new tokens, since a token's text depends on the token before it.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # ids that are still decoded
        self._shown = 0  # how many of them have been sent already and serve as context

    def push(self, ids: Sequence[int], *, last: bool = False) -> str:
        """Returns the new text; `last` also flushes an unfinished character."""
        self._ids.extend(ids)
        shown = self._tokenizer.decode(self._ids[: self._shown])
        text = self._tokenizer.decode(self._ids)
        if text == shown:  # only special tokens, which have no text
            del self._ids[self._shown :]
            return ""
        if len(text) < len(shown) or (text.endswith(_PARTIAL) and not last):
            return self._final_part(text)[len(shown) :]
        del self._ids[: self._shown]
        self._shown = len(self._ids)
        return text[len(shown) :]

    def _final_part(self, text: str) -> str:
        """Returns the part of `text` that later tokens cannot change; "" while fewer than PENDING_TOKENS tokens are pending.

        A model may go on generating bytes that form no character. Decoding all of them again for each token would take
        quadratic time. So the ids are cut where decoding both parts separately gives the same text; "" if there is no such
        cut. A cut does not split a character that the newest ids may still complete.
        """
        if len(self._ids) - self._shown < PENDING_TOKENS:
            return ""
        for cut in range(len(self._ids) - 1, len(self._ids) - CHARACTER_BYTES - 1, -1):
            before = self._tokenizer.decode(self._ids[:cut])
            if before + self._tokenizer.decode(self._ids[cut:]) == text:
                del self._ids[:cut]
                self._shown = 0
                return before
        return ""
