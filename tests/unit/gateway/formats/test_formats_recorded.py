"""Recorded outputs of each family become the right pieces, however the text is cut."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations, count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_support import RECORDED, Recorded

from moiety.gateway.formats.format import FORMATS
from moiety.gateway.formats.pieces import CallArguments, CallBegins, Piece, joined

MARKERS = sorted({
    *("<think>", "</think>", "[THINK]", "[/THINK]", "<tool_call>", "</tool_call>", "<|python_tag|>", "<|eot_id|>", "</s>"),
    *("<|python_start|>", "<|python_end|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "function", "```json\n", "\n```"),
    *("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
    *("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>", "assistant", "analysis"),
    *(" to=functions.f", '{"name": "f", "arguments": ', '"parameters": ', '{"a": "b"}', "{", "}", "[", "]", "(", ")", ","),
    *(";", "=", "\\", "'", '"', "f", "f(a=1)", "[f(a=", " ", "\n", "x", "null", "é", "😀", "<", "|", ":"),
})  # fmt: skip


def parsed(recorded: Recorded, parts: Iterable[str]) -> list[Piece]:
    """Returns the pieces of the parts, joined."""
    numbers = count()
    parser = FORMATS[recorded.format].parser(
        tools=recorded.tools, reasoning_open=recorded.reasoning_open, new_id=lambda: f"call_{next(numbers)}"
    )
    return joined([*(piece for part in parts for piece in parser.push(part)), *parser.end()])


def cut(text: str, *at: int) -> list[str]:
    """Returns the parts of the text between the indices `at`."""
    return [text[start:end] for start, end in zip((0, *at), (*at, len(text)), strict=True)]


@pytest.mark.parametrize("recorded", RECORDED, ids=str)
def test_a_recorded_output_is_its_pieces(recorded: Recorded):
    """Content, reasoning and calls are those that the output stands for."""
    assert parsed(recorded, [recorded.text]) == list(recorded.pieces)


@pytest.mark.parametrize("recorded", RECORDED, ids=str)
def test_how_a_text_is_cut_makes_no_difference(recorded: Recorded):
    """Every cut into two parts, and the text character by character, give the same pieces."""
    whole, text = parsed(recorded, [recorded.text]), recorded.text
    assert parsed(recorded, text) == whole
    for at in range(len(text) + 1):
        assert parsed(recorded, cut(text, at)) == whole, at


@pytest.mark.parametrize("recorded", [each for each in RECORDED if len(each.text) <= 80], ids=str)
def test_cuts_into_three_parts_make_no_difference(recorded: Recorded):
    """Every cut of a short text into three parts gives the same pieces."""
    whole, text = parsed(recorded, [recorded.text]), recorded.text
    for first, second in combinations(range(len(text) + 1), 2):
        assert parsed(recorded, cut(text, first, second)) == whole, (first, second)


@pytest.mark.parametrize("name", FORMATS)
@settings(deadline=None)
@given(parts=st.lists(st.sampled_from(MARKERS), max_size=24), tools=st.booleans(), opened=st.booleans(), data=st.data())
def test_no_text_raises_and_no_cut_matters(name: str, parts: list[str], tools: bool, opened: bool, data: st.DataObject):
    """Text of markers, brackets and names in any order is parsed, and to the same pieces however it is cut."""
    text = "".join(parts)
    recorded = Recorded(name, "random", text, (), tools, opened)
    whole = parsed(recorded, [text])
    assert parsed(recorded, text) == whole
    assert parsed(recorded, parts) == whole
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=4))
    assert parsed(recorded, cut(text, *sorted(cuts))) == whole
    begun = [piece.index for piece in whole if isinstance(piece, CallBegins)]
    assert begun == list(range(len(begun)))
    assert {piece.index for piece in whole if isinstance(piece, CallArguments)} <= set(begun)
