"""Splits a reply into reasoning and answer, while the text streams in."""

from __future__ import annotations

from collections.abc import Iterator

from moiety.gateway.formats.stepping import held

BEGIN, END = "<think>", "</think>"


class ReasoningSplitter:
    """Splits a streamed text at <think> and </think>. A part of a marker at the end of a piece waits for the next one.

    `answer` is what came outside the markers. Some templates open the reasoning in the prompt, so that the reply has only
    </think>: what came before that is taken out of `answer`, and `opened_by_prompt` says so. `inside`: whether the
    text begins as reasoning.
    """

    def __init__(self, inside: bool = False):
        self.inside = inside
        self.opened_by_prompt = inside
        self.answer = ""
        self._waiting = ""

    def push(self, text: str, *, last: bool = False) -> Iterator[tuple[str, bool]]:
        """Yields pieces without markers, and whether each is reasoning. `last`: no more text follows."""
        text = self._waiting + text
        self._waiting = ""
        while text:
            marker = min((BEGIN, END), key=lambda each: _place(text, each))
            place = _place(text, marker)
            if place == len(text):
                keep = 0 if last else held(text, (BEGIN, END))
                self._waiting = text[len(text) - keep :]
                yield from self._piece(text[: len(text) - keep])
                return
            yield from self._piece(text[:place])
            if marker == END and not self.inside:
                self.opened_by_prompt, self.answer = True, ""
            self.inside = marker == BEGIN
            text = text[place + len(marker) :]

    def _piece(self, text: str) -> Iterator[tuple[str, bool]]:
        if text:
            self.answer += "" if self.inside else text
            yield text, self.inside


def _place(text: str, marker: str) -> int:
    place = text.find(marker)
    return place if place >= 0 else len(text)
