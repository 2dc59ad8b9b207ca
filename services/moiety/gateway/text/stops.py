"""Finds stop strings in a stream of text."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes on the text before the first stop string that is completed.

    Holds back text that may still become a stop string, so that sent text never has to be retracted. The result does not
    depend on how the text was cut into pieces: text is matched character by character (Knuth, Morris and Pratt 1977).
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = [(stop, _borders(stop)) for stop in stops]
        self._matched = [0] * len(stops)  # characters of each stop string that the text so far ends with
        self._held = ""
        self.matched: str | None = None  # the stop string that was completed

    def push(self, text: str, *, last: bool = False) -> str:
        """Returns the text to send now. `last`: no text follows, so held-back text is also returned."""
        for end, character in enumerate(text, start=1):
            completed = ""
            for index, (stop, borders) in enumerate(self._stops):
                matched = self._matched[index]
                while matched and stop[matched] != character:
                    matched = borders[matched - 1]
                matched += stop[matched] == character
                self._matched[index] = matched
                if matched == len(stop) and matched > len(completed):
                    completed = stop
            if completed:
                self.matched = completed
                whole = self._held + text[:end]
                return whole[: len(whole) - len(completed)]
        whole = self._held + text
        held = 0 if last else max(self._matched, default=0)
        self._held = whole[len(whole) - held :]
        return whole[: len(whole) - held]


def _borders(stop: str) -> list[int]:
    """Returns, for each non-empty prefix p of `stop`, the length of the longest shorter prefix with which p ends."""
    borders = [0] * len(stop)
    for end in range(1, len(stop)):
        length = borders[end - 1]
        while length and stop[length] != stop[end]:
            length = borders[length - 1]
        borders[end] = length + (stop[length] == stop[end])
    return borders
