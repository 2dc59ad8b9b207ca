"""Text to token ids and back. The only part of the system that knows about text."""

from __future__ import annotations

from collections.abc import Sequence

from moiety.errors import InvalidRequest
from moiety.model.checkpoint.tokenizer import open_tokenizer

MAX_PROMPT_BYTES = 16 << 20
CHARACTER_BYTES = 4  # UTF-8's longest, and so the most tokens one character can be cut into
PENDING_TOKENS = 3 * CHARACTER_BYTES
_PARTIAL = "\ufffd"  # what a decoder shows for the bytes of an unfinished character


class Tokenizer:
    """A checkpoint's tokenizer, and the ids that end its generations."""

    def __init__(self, folder: str):
        """Raises CheckpointError when the folder has no usable tokenizer."""
        self._tokenizer, self.stop_ids = open_tokenizer(folder)

    def encode(self, text: str) -> list[int]:
        """Raises InvalidRequest when the text is empty or beyond all reason."""
        if not text:
            raise InvalidRequest("prompt.text", text, "at least one character")
        if len(text) > MAX_PROMPT_BYTES:
            raise InvalidRequest("prompt.text", f"{len(text)} characters", f"at most {MAX_PROMPT_BYTES}")
        ids: list[int] = self._tokenizer.encode(text)
        return ids

    def token_id(self, token: str) -> int:
        """The id of the token whose text is exactly `token`. Raises InvalidRequest where there is none."""
        found = self._tokenizer.get_vocab().get(token)
        if found is None:
            raise InvalidRequest("sampling.first_token", token, "the text of a token of this model")
        return int(found)

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text


class Detokenizer:
    """Turns a stream of token ids into a stream of text: characters are sent once they are whole.

    Decodes from a little before the new tokens, since how a token reads depends on the one before it.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # those that are still decoded
        self._shown = 0  # of them were sent, and are there as context

    def push(self, ids: Sequence[int], *, last: bool = False) -> str:
        """The new text; `last` flushes an unfinished character too."""
        self._ids.extend(ids)
        shown = self._tokenizer.decode(self._ids[: self._shown])
        text = self._tokenizer.decode(self._ids)
        if text == shown:  # special tokens
            del self._ids[self._shown :]
            return ""
        if len(text) < len(shown) or (text.endswith(_PARTIAL) and not last):
            return self._give_up_on(text)[len(shown) :]
        del self._ids[: self._shown]
        self._shown = len(self._ids)
        return text[len(shown) :]

    def _give_up_on(self, text: str) -> str:
        """What of `text` will never change, once more tokens are pending than a character can need.

        Bytes that are no text may go on for ever, and decoding all of them at each token would cost their square. They
        are cut where decoding both sides apart gives the same: not within a character that the newest may yet complete.
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
