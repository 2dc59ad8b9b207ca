"""Reasoning is split from the answer, however the text is cut into pieces."""

from __future__ import annotations

from itertools import groupby

import pytest

from moiety.tools.chat.reasoning import ReasoningSplitter


def split(pieces: list[str], inside: bool = False) -> tuple[list[tuple[str, bool]], ReasoningSplitter]:
    """Returns runs of text with whether each is reasoning, and the splitter."""
    splitter = ReasoningSplitter(inside)
    got = [one for place, piece in enumerate(pieces) for one in splitter.push(piece, last=place + 1 == len(pieces))]
    return [("".join(text for text, _ in run), kind) for kind, run in groupby(got, lambda one: one[1])], splitter


@pytest.mark.parametrize(
    ("text", "inside", "expected", "answer", "opened_by_prompt"),
    [
        ("no reasoning", False, [("no reasoning", False)], "no reasoning", False),
        ("<think>a<b</think>c</d", False, [("a<b", True), ("c</d", False)], "c</d", False),
        ("why</think>so", True, [("why", True), ("so", False)], "so", True),
        ("why</think>so", False, [("whyso", False)], "so", True),
        ("a<think>b</think>c<think>d", False, [("a", False), ("b", True), ("c", False), ("d", True)], "ac", False),
        ("ends in a part <thi", False, [("ends in a part <thi", False)], "ends in a part <thi", False),
    ],
)
def test_every_cut(
    text: str, inside: bool, expected: list[tuple[str, bool]], answer: str, opened_by_prompt: bool
) -> None:
    """Cut in two at any place, or into single characters, a text has the same parts and the same answer."""
    cuts = [[text[:place], text[place:]] for place in range(len(text) + 1)]
    for pieces in [*cuts, [*text]]:
        parts, splitter = split(pieces, inside)
        assert parts == expected, pieces
        assert (splitter.answer, splitter.opened_by_prompt) == (answer, opened_by_prompt)
