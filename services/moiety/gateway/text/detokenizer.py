"""Turns a stream of token ids into a stream of text."""

from __future__ import annotations

from collections.abc import Sequence

from moiety.gateway.text.tokenizer import Tokenizer

CONTEXT_TOKENS = 4  # an unfinished UTF-8 character has at most 3 bytes, and so 3 tokens; and one token before it
_PARTIAL = "\ufffd"  # what a decoder shows for the bytes of an unfinished character


class Detokenizer:
    """Turns a stream of token ids into a stream of text; returns each character once later tokens cannot change it.

    The text of an output is what decode(prompt + output) has after decode(prompt). (Where the output completes a
    character that the prompt began, it is what follows their longest common prefix.) The portions in which ids arrive
    make no difference.

    Only a window of the last ids is decoded, so time grows with the number of tokens. A decoder treats the first token
    of a text unlike the others: it may drop its leading space. So a window begins with a token whose text is sent or belongs
    to the prompt, unless it begins where the text begins. Tokens that decoding skips are left out, since they are no context.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), *, special: bool = False):
        """`prompt` are the ids before the output; empty for an encoder-decoder, whose output is a text of its own.

        `special`: special tokens are text, too.
        """
        self._tokenizer, self._kinds, self._special = tokenizer, tokenizer.kinds, special
        self._window: list[int] = []
        for token in reversed(prompt):
            # A window may begin inside a character, but not inside a run of byte tokens, which `push` decodes as a whole.
            if len(self._window) >= CONTEXT_TOKENS and self._window[-1] not in self._kinds.byte_ids:
                break
            if special or self._kinds.has_text(token):
                self._window.append(token)
        self._window.reverse()
        self._shown = self._decode(self._window)  # the window's text that is not to be sent again

    @property
    def held(self) -> int:
        """Number of characters that `push` has not returned because the byte tokens after them may change them."""
        for unfinished in range(CONTEXT_TOKENS):  # tokens at the end that are no whole character yet
            text = self._decode(self._window[: len(self._window) - unfinished])
            if not text.endswith(_PARTIAL):
                return max(len(text) - len(self._shown), 0)
        return 0

    def push(self, ids: Sequence[int], *, last: bool = False) -> str:
        """Returns the new text; `last` also flushes an unfinished character.

        A run of byte tokens ("<0xE2>") is text once a token of another kind follows it: a decoder shows all its bytes as
        replacement characters where one of them is wrong, the last included.
        """
        self._window.extend(ids if self._special else filter(self._kinds.has_text, ids))
        if not self._window or (self._window[-1] in self._kinds.byte_ids and not last):
            return ""
        text = self._decode(self._window)
        unfinished = not last and text.endswith(_PARTIAL)
        settled = text[:-1] if unfinished else text
        if len(settled) < len(self._shown) and self._shown.startswith(settled):
            return ""  # still inside the prompt's last character
        while not settled.startswith(self._shown):  # the output changes the prompt's last character
            self._shown = self._shown[:-1]
        piece = settled[len(self._shown) :]
        # One token is context enough after a whole character. Otherwise its first bytes may be among the last tokens.
        kept = 1 if piece and not unfinished else CONTEXT_TOKENS
        del self._window[:-kept]
        self._shown = self._decode(self._window)
        if unfinished:
            self._shown = self._shown[:-1]
        return piece

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, special=self._special)
