"""One choice's text, as a stream: detokenised, up to its first stop string."""

from __future__ import annotations

from collections.abc import Sequence

from moiety.gateway.text.detokenizer import Detokenizer
from moiety.gateway.text.stops import StopStrings
from moiety.gateway.text.tokenizer import Tokenizer

FIRST_MARK = 0xD800  # surrogates, which no decoded text has


class OutputText:
    """One choice: turns its tokens into text, up to its first stop string.

    A stop string may have special tokens in it, which decoding leaves out. Each of these gets a mark: a character that stands
    for it in the stop strings and in the text that is searched, and is taken out of what is sent. The string as given is
    searched for too, since other tokens may spell it.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], continues: Sequence[int], *, special: bool = False):
        """`continues`: the ids whose text the output continues. `special`: special tokens are text, too."""
        found = {text for stop in stops for text in tokenizer.special_texts.findall(stop)} if not special else set()
        marks = {text: chr(FIRST_MARK + number) for number, text in enumerate(sorted(found))}
        self._marks = {tokenizer.special_id(text): mark for text, mark in marks.items()}
        self._unmarked = str.maketrans("", "", "".join(marks.values()))
        self._named = {stop: stop for stop in stops}
        if marks:
            self._named |= {tokenizer.special_texts.sub(lambda text: marks[text[0]], stop): stop for stop in stops}
        self._detokenizer, self._stops = Detokenizer(tokenizer, continues, special=special), StopStrings([*self._named])
        self._produced = 0
        self._exempt = 0  # characters of the first min_tokens tokens that the detokenizer still holds

    @property
    def matched(self) -> str | None:
        """The stop string that ended the text; None while there is none."""
        return self._named.get(self._stops.matched or "")

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
        text = self._marked(ids[len(early) :], last=last)
        exempt = text[: self._exempt]
        self._exempt -= len(exempt)
        return sent + (exempt + self._stops.push(text[len(exempt) :], last=last)).translate(self._unmarked)

    def _marked(self, ids: Sequence[int], *, last: bool) -> str:
        """Returns the new text, with a mark for each special token of a stop string."""
        text, start = "", 0
        for place, token in enumerate(ids) if self._marks else ():
            if token in self._marks:
                text += self._detokenizer.push(ids[start:place]) + self._marks[token]
                start = place + 1
        return text + self._detokenizer.push(ids[start:], last=last)
