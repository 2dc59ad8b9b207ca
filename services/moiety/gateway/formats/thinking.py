"""Parsers around others: one splits off reasoning at the start of an output, one drops the token that ends it."""

from __future__ import annotations

from moiety.gateway.formats.pieces import OutputParser, Piece, Reasoning
from moiety.gateway.formats.stepping import SteppingParser, held


class ThinkingParser(SteppingParser):
    """Splits off reasoning between two markers at the start of an output; `inner` parses the text after it.

    White space next to the markers belongs to the format and is dropped. A marker later in the output is text. Where the
    second marker is missing, the whole output is reasoning.
    """

    def __init__(self, pairs: tuple[tuple[str, str], ...], inner: OutputParser, *, opened: bool):
        """`pairs`: markers before and after reasoning. `opened`: the prompt contains the first marker."""
        super().__init__()
        self._closing, self._inner = dict(pairs), inner
        self._closes = tuple(closing for _, closing in pairs)
        self._step = self._reasoning_begins if opened else self._output_begins

    def step(self) -> bool:
        """Takes the next part of the reasoning, or gives text to the inner parser."""
        return self._step()

    def finish(self) -> list[Piece]:
        """Returns what the inner parser held back."""
        return self._inner.end()

    def _output_begins(self) -> bool:
        space = self.take_space()
        opening = self.at(*self._closing) if self._closing else None
        if opening:
            self.take(len(opening))
            self._closes = (self._closing[opening],)
            self._step = self._reasoning_begins
            return True
        self.text = space + self.text
        if opening is None:
            self._step = self._content
        return opening is None

    def _reasoning_begins(self) -> bool:
        self._step = self._reasoning if self.skip_space() else self._step
        return bool(self.text)

    def _reasoning(self) -> bool:
        text, _, closing = self.until(*self._closes)
        self.emit(Reasoning(text))
        if closing:
            self._step = self._content_begins
        return closing is not None

    def _content_begins(self) -> bool:
        self._step = self._content if self.skip_space() else self._step
        return bool(self.text)

    def _content(self) -> bool:
        self.emit(*self._inner.push(self.take(len(self.text))))
        return False


class EndParser:
    """Drops the token that ends an output, where special tokens are decoded; `inner` parses the rest."""

    def __init__(self, ends: tuple[str, ...], inner: OutputParser):
        self._ends, self._inner, self._held = ends, inner, ""

    def push(self, text: str) -> list[Piece]:
        """Takes the next part of the text; holds back what may be the token at the end."""
        whole = self._held + text
        free = len(whole) - held(whole, self._ends, whole=True)
        self._held = whole[free:]
        return self._inner.push(whole[:free])

    def end(self) -> list[Piece]:
        """Returns what was held back, unless it is the token."""
        rest = [] if self._held in self._ends else self._inner.push(self._held)
        return [*rest, *self._inner.end()]
