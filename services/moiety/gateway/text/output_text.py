"""One choice's text, as a stream: detokenised, up to its first stop string."""

from __future__ import annotations

from collections.abc import Sequence

from moiety.gateway.text.detokenizer import Detokenizer
from moiety.gateway.text.stops import StopStrings
from moiety.gateway.text.tokenizer import Tokenizer


class OutputText:
    """One choice: turns its tokens into text, up to its first stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], continues: Sequence[int], *, special: bool = False):
        """`continues`: the ids whose text the output continues. `special`: special tokens are text, too."""
        self._detokenizer, self._stops = Detokenizer(tokenizer, continues, special=special), StopStrings(stops)
        self._produced = 0
        self._exempt = 0  # characters of the first min_tokens tokens that the detokenizer still holds

    @property
    def matched(self) -> str | None:
        """The stop string that ended the text; None while there is none."""
        return self._stops.matched

    def push(self, ids: Sequence[int], min_tokens: int, *, last: bool) -> str:
        """Returns the text to send. A stop string may end the text here: see `matched`.

        The text of the first `min_tokens` tokens is not searched for stop strings.
        """
        early = ids[: max(min_tokens - self._produced, 0)]
        self._produced += len(ids)
        only_early = self._produced <= min_tokens
        sent = self._detokenizer.push(early, last=last and only_early) if early or only_early else ""
        if early and self._produced >= min_tokens:
            self._exempt = self._detokenizer.held
        if only_early:
            return sent
        text = self._detokenizer.push(ids[len(early) :], last=last)
        exempt = text[: self._exempt]
        self._exempt -= len(exempt)
        return sent + exempt + self._stops.push(text[len(exempt) :], last=last)
