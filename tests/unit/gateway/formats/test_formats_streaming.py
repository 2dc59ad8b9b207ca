"""Pieces come as soon as no later text can change them."""

from __future__ import annotations

import re
import time

import pytest

from moiety.gateway.formats.format import FORMATS
from moiety.gateway.formats.pieces import CallArguments, CallBegins, Content, Piece, Reasoning, call_id, joined

BEFORE_ARGUMENTS = {
    "hermes": '<tool_call>\n{"name": "f", "arguments": ',
    "llama": '{"name": "f", "parameters": ',
    "mistral": '[TOOL_CALLS] [{"name": "f", "arguments": ',
    "mistral_args": "[TOOL_CALLS]f[ARGS]",
    "deepseek": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n",
    "deepseek_v31": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>",
    "gpt_oss": "<|channel|>commentary to=functions.f <|constrain|>json<|message|>",
}


def texts(pieces: list[Piece]) -> str:
    """Returns the text of pieces of one kind."""
    return "".join(piece.text for piece in pieces if not isinstance(piece, CallBegins))


@pytest.mark.parametrize("name", BEFORE_ARGUMENTS)
def test_arguments_stream_character_by_character(name: str):
    """A call begins with its arguments' first bracket, and each character of these comes at once."""
    parser = FORMATS[name].parser(tools=True, new_id=lambda: "id")
    assert [each for each in parser.push(BEFORE_ARGUMENTS[name]) if not isinstance(each, CallBegins)] == []
    arguments = '{"a":[1,{"b":"c\\"}"}],"d":null}'
    sent = ""
    for character in arguments:
        sent += "".join(each.text for each in parser.push(character) if isinstance(each, CallArguments))
        assert arguments.startswith(sent)
        assert sent.endswith(character)
    assert sent == arguments


def test_an_argument_in_python_comes_once_it_is_complete():
    """Llama 4's arguments come one by one."""
    parser = FORMATS["llama4"].parser(tools=True, new_id=lambda: "id")
    assert parser.push("[f(a=") == [CallBegins(0, "id", "f")]
    assert parser.push('"x, y') == []
    assert texts(parser.push('", b=1')) == '{"a": "x, y"'
    assert texts(parser.push(")]")) == ', "b": 1}'


@pytest.mark.parametrize("name", FORMATS)
def test_content_without_markers_comes_at_once(name: str):
    """A word comes with the push that brings it; only white space after it waits, where calls may follow."""
    parser = FORMATS[name].parser(tools=True)
    for word in ("Each", " expert", " group", " is", " 2 > 1"):
        assert texts(parser.push(word)) == word


@pytest.mark.parametrize(
    ("name", "marker"),
    [
        ("hermes", "<tool_call>"),
        ("llama", "<|python_tag|>"),
        ("llama4", "<|python_start|>"),
        ("mistral", "[TOOL_CALLS]"),
        ("deepseek", "<｜tool▁calls▁begin｜>"),
        ("gpt_oss", "<|end|>"),
    ],
)
def test_what_may_become_a_marker_is_held_back_and_no_more(name: str, marker: str):
    """The beginning of a marker waits until the next character shows that it is text."""
    for length in range(1, len(marker)):
        parser = FORMATS[name].parser(tools=True)
        assert texts(parser.push("So" + marker[:length])) == "So"
        assert texts(parser.push("é")) == marker[:length] + "é"
        assert parser.end() == []


def test_reasoning_streams():
    """Reasoning comes as it is written, apart from what may end it."""
    parser = FORMATS["hermes"].parser(tools=True)
    assert parser.push("<think>\n") == []
    assert parser.push("One") == [Reasoning("One")]
    assert parser.push(" two.\n</thi") == [Reasoning(" two.")]
    assert parser.push("nk>\n\n") == []
    assert parser.push("Yes") == [Content("Yes")]


def test_white_space_inside_text_stays():
    """Only white space next to markers is dropped."""
    parser = FORMATS["hermes"].parser(tools=True)
    parts = ("  a \n", "\n b ", "c  ")
    assert joined([*(piece for part in parts for piece in parser.push(part)), *parser.end()]) == [
        Content("".join(parts))
    ]


def test_ids_are_random():
    """An id has OpenAI's form, and no two are equal."""
    ids = {call_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(re.fullmatch("call_[A-Za-z0-9]{24}", each) for each in ids)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("hermes", "<tool_call>"),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'),
        ("llama", "<|python_tag|>{"),
        ("llama4", "<|python_start|>[f(a=[[1"),
        ("mistral", "[TOOL_CALLS][{"),
        ("mistral_args", "[TOOL_CALLS]f[CALL_ID]"),
        ("deepseek", "<｜tool▁call▁begin｜>f<｜tool▁sep｜>"),
        ("gpt_oss", "<|start|><|channel|>"),
        ("hermes", " \n"),
        ("plain", "<think>"),
    ],
)
def test_a_long_output_of_markers_takes_little_time(name: str, part: str):
    """Time grows with the length of an output, not with its square, whether it comes whole or in small parts."""
    count = 2000  # 0.02 to 0.2 s
    began = time.thread_time()
    parser = FORMATS[name].parser(tools=True)
    parser.push(part * count)
    parser.end()
    parser = FORMATS[name].parser(tools=True)
    for _ in range(count):
        parser.push(part)
    parser.end()
    assert time.thread_time() - began < 3


@pytest.mark.parametrize(("name", "before"), [("mistral", "[TOOL_CALLS]name"), ("llama4", "[f(a")])
def test_white_space_after_a_name_takes_linear_time(name: str, before: str):
    """A model that goes on with white space does not hold the event loop."""
    parser, began = FORMATS[name].parser(tools=True), time.process_time()
    for piece in (before, *[" " * 16] * 600, "?"):
        parser.push(piece)
    assert time.process_time() - began < 2.0
