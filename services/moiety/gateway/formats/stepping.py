"""The base of parsers that walk through their text in steps and hold back what later text may still change."""

from __future__ import annotations

from abc import ABC, abstractmethod

from moiety.gateway.formats.call_object import CallObject
from moiety.gateway.formats.pieces import CallArguments, CallBegins, Content, NewId, Piece


class SteppingParser(ABC):
    """Collects text in `text`, and calls `step` until it wants more text.

    A step looks at `text` alone, and at `last`, never at where a push ended: so pushes may be cut anywhere.
    """

    def __init__(self) -> None:
        self.text = ""  # not yet taken
        self.last = False  # no text follows
        self._pieces: list[Piece] = []

    def push(self, text: str) -> list[Piece]:
        """Takes the next part of the text; returns the pieces that later text cannot change."""
        self.text += text
        while self.text and self.step():
            pass
        pieces, self._pieces = self._pieces, []
        return pieces

    def end(self) -> list[Piece]:
        """Returns what was held back."""
        self.last = True
        return [*self.push(""), *self.finish()]

    @abstractmethod
    def step(self) -> bool:
        """Takes text and emits pieces. Returns whether another step may do more before text follows."""

    def finish(self) -> list[Piece]:
        """Returns the last pieces, once no step can do more."""
        return []

    def emit(self, *pieces: Piece) -> None:
        """Adds pieces to the result, except empty ones."""
        self._pieces.extend(piece for piece in pieces if isinstance(piece, CallBegins) or piece.text)

    def take_space(self) -> str:
        """Takes white space at the start of the text."""
        return self.take(len(self.text) - len(self.text.lstrip()))

    def take(self, characters: int) -> str:
        """Takes that many characters of the text."""
        taken, self.text = self.text[:characters], self.text[characters:]
        return taken

    def skip_space(self) -> bool:
        """Drops white space at the start of the text. Returns whether text follows."""
        self.text = self.text.lstrip()
        return bool(self.text)

    def at(self, *markers: str) -> str | None:
        """Returns the marker with which the text begins; "" if later text decides that; None if it begins with none."""
        for marker in markers:
            if self.text.startswith(marker):
                return marker
        return "" if not self.last and any(marker.startswith(self.text) for marker in markers) else None

    def until(self, *markers: str) -> tuple[str, str, str | None]:
        """Takes the text before the first marker, white space before it, and the marker.

        Where there is no marker, takes all that cannot belong to one or to white space before one; the rest stays.
        """
        found = min(((at, marker) for marker in markers if (at := self.text.find(marker)) >= 0), default=None)
        if found is not None:
            before, marker = self.take(found[0]), self.take(len(found[1]))
            text = before.rstrip()
            return text, before[len(text) :], marker
        if self.last:
            return self.take(len(self.text)), "", None
        free = self.text[: len(self.text) - held(self.text, markers)].rstrip()
        return self.take(len(free)), "", None


class CallsParser(SteppingParser):
    """A stepping parser that begins tool calls and counts them."""

    def __init__(self, new_id: NewId):
        super().__init__()
        self._new_id, self.calls = new_id, 0
        self.opening = ""  # what was taken of a call that has not begun: content if it never does
        self._object = self.new_object()

    def begin(self, name: str) -> None:
        """Emits the beginning of the next call."""
        self.emit(CallBegins(self.calls, self._new_id(), name))
        self.calls += 1
        self.opening = ""

    def arguments(self, text: str) -> None:
        """Emits arguments of the call that was begun last."""
        self.emit(CallArguments(self.calls - 1, text))

    def give_up(self) -> None:
        """Emits as content what was taken of a call that does not begin."""
        self.emit(Content(self.opening))
        self.opening = ""

    def new_object(self, *, certain: bool = True) -> CallObject:
        """Prepares for an object, see `CallObject`."""
        self._object = CallObject(self.begin, self.arguments, certain=certain)
        return self._object

    def take_object(self) -> bool | None:
        """Takes the next part of the object. Returns whether it was a call once it has ended, and None before."""
        taken = self.take(self._object.feed(self.text))
        if not self._object.begun:
            self.opening += taken
        if not self._object.ended:
            return None
        if not self._object.begun:
            self.give_up()
        return self._object.begun

    def finish(self) -> list[Piece]:
        """Returns what was taken of a call that has not begun."""
        return [Content(self.opening)] if self.opening else []


class Verbatim:
    """The parser of a text that is nothing but content."""

    def push(self, text: str) -> list[Piece]:
        """Returns the text as content."""
        return [Content(text)] if text else []

    def end(self) -> list[Piece]:
        """Returns nothing: nothing is held back."""
        return []


def held(text: str, markers: tuple[str, ...], *, whole: bool = False) -> int:
    """Returns how many characters at the end of `text` may be the beginning of a marker; with `whole`, or one marker."""
    longest = max(map(len, markers), default=0) - (not whole)
    end = text[-longest:] if longest > 0 else ""
    if not any(marker[0] in end for marker in markers):  # the common case, in a fraction of the time
        return 0
    for length in range(len(end), 0, -1):
        if any(marker.startswith(text[-length:]) and (whole or length < len(marker)) for marker in markers):
            return length
    return 0
