"""Log probabilities as OpenAI's two APIs show them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moiety.core.sampling import TopLogprobs
from moiety.errors import InvalidRequest
from moiety.gateway.text.tokenizer import Token, Tokenizer

_NOTHING = Token("", b"")
LEAST = -9999.0  # stands for minus infinity, which JSON lacks


class TokenNames:
    """What log probabilities call a token."""

    def __init__(self, tokenizer: Tokenizer, *, as_ids: bool):
        """`as_ids`: token_id:5 instead of the token's text. So it is, too, where there is no tokenizer."""
        self._tokenizer, self._as_ids = tokenizer, as_ids or tokenizer.skipped

    def plain(self, token_id: int) -> str:
        """Returns the token's text; of a part of a character, its bytes, as bytes:\\xe2\\x82."""
        if self._as_ids:
            return f"token_id:{token_id}"
        token = self._token(token_id)
        if "\ufffd" in token.text:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.bytes)
        return token.text

    def length(self, token_id: int) -> int:
        """Returns how many characters of text the token stands for by itself."""
        if not self._tokenizer.kinds.has_text(token_id):
            return 0
        return len(self._token(token_id).text)

    def chat(self, token_id: int, logprob: float) -> dict[str, Any]:
        """Returns the token as chat completions show it."""
        token = self._token(token_id)
        name = f"token_id:{token_id}" if self._as_ids else token.text
        return {"token": name, "logprob": max(logprob, LEAST), "bytes": [*token.bytes]}

    def _token(self, token_id: int) -> Token:
        """Returns what a token shows: nothing, where it is one of those that only pad a model's vocabulary."""
        try:
            return self._tokenizer.token(token_id)
        except InvalidRequest:
            return _NOTHING


class CompletionLogprobs:
    """The log probabilities of one choice of a completion, with the place of each token in its text."""

    def __init__(self, names: TokenNames):
        self._names = names
        self._offset = 0

    def part(
        self, ids: Sequence[int], logprobs: Sequence[float | None], tops: Sequence[TopLogprobs | None]
    ) -> dict[str, list[Any]]:
        """Returns the log probabilities of further tokens. `tops` is empty where only the chosen tokens are wanted."""
        part: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for place, (token_id, logprob) in enumerate(zip(ids, logprobs, strict=False)):
            name = self._names.plain(token_id)
            part["tokens"].append(name)
            part["text_offset"].append(self._offset)
            self._offset += self._names.length(token_id)
            if logprob is None:  # the first token of a prompt
                part["token_logprobs"].append(None)
                part["top_logprobs"].append(None)
                continue
            likeliest: dict[str, float] = {}
            if place < len(tops) and (top := tops[place]) is not None:
                for other, value in zip(top.token_ids, top.logprobs, strict=True):
                    likeliest.setdefault(self._names.plain(other), max(value, LEAST))
            likeliest.setdefault(name, max(logprob, LEAST))
            part["token_logprobs"].append(max(logprob, LEAST))
            part["top_logprobs"].append(likeliest)
        return part


def chat_logprobs(
    names: TokenNames, ids: Sequence[int], logprobs: Sequence[float], tops: Sequence[TopLogprobs]
) -> list[dict[str, Any]]:
    """Returns the entries of `logprobs.content` for tokens of a chat completion."""
    found = []
    for place, (token_id, logprob) in enumerate(zip(ids, logprobs, strict=False)):
        entry = names.chat(token_id, logprob)
        likeliest = zip(tops[place].token_ids, tops[place].logprobs, strict=True) if tops else ()
        entry["top_logprobs"] = [names.chat(other, value) for other, value in likeliest]
        found.append(entry)
    return found
