"""The formats of Llama 4: a list of calls in Python's syntax, or the JSON objects of Llama 3.

    [get_weather(city="Paris"), get_time(zone="Europe/Paris")]
    <|python_start|>[get_weather(city="Paris")]<|python_end|>
    {"name": "get_weather", "parameters": {"city": "Paris"}}

Sources: llama.com's "Model Cards and Prompt Formats" of Llama 4, "Tool calling"; the chat template of
meta-llama/Llama-4-Scout-17B-16E-Instruct, which asks for JSON. A guide therefore forces JSON.
"""

from __future__ import annotations

import json
import re

from moiety.gateway.formats.family import Family
from moiety.gateway.formats.llama import LLAMA, LlamaCalls
from moiety.gateway.formats.pieces import NewId

PYTHON_START, PYTHON_END = "<|python_start|>", "<|python_end|>"
_NAME = r"[A-Za-z_][A-Za-z0-9_.]{0,127}"
_FIRST, _FIRST_BEGUN = re.compile(rf"\[\s*({_NAME})\s*\("), re.compile(rf"\[\s*(?:{_NAME}\s*)?")
_NEXT, _NEXT_BEGUN = re.compile(rf",\s*({_NAME})\s*\("), re.compile(rf",\s*(?:{_NAME}\s*)?")
_KEY = re.compile(r",?\s*([A-Za-z_]\w{0,127})\s*=\s*(?=\S)")
# `\s*+` gives nothing back, so that many spaces that do not match take linear time.
_KEY_BEGUN = re.compile(r",?\s*(?:[A-Za-z_]\w{0,127}\s*+=?\s*+)?")
_TOKEN = re.compile(
    r"""\s*(?:(?P<string>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')|(?P<number>-?\d[\d.eE+-]*)|(?P<word>\w+)|(?P<mark>[\[\](){},:]))\s*""",
    re.DOTALL,
)
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|(.))", re.DOTALL)
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "0": "\0", "\\": "\\", "'": "'", '"': '"', "\n": ""}
_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_BRACKETS = {"(": "[", ")": "]"}


class Llama4Calls(LlamaCalls):
    """Finds calls at the start of an output, or after `<|python_start|>`.

    A list is one of calls if it begins with a name and a bracket; any other text is content. Each argument is passed on as
    JSON once it is complete. Where a call breaks off or is no call with literals as keyword arguments, its
    arguments end, and the text that follows is content.
    """

    def __init__(self, new_id: NewId):
        super().__init__(new_id, PYTHON_START, PYTHON_END)
        self._value, self._end = "", LiteralEnd()
        self._before = ""  # the next argument's key, with the JSON before it
        self._first = True  # whether no argument of this call is complete

    def _start(self) -> bool:
        self.opening += self.take_space()
        if not self.text.startswith("["):
            return super()._start()
        if head := _FIRST.match(self.text):
            return self._begin_call(head)
        if not self.last and _FIRST_BEGUN.fullmatch(self.text):
            return False
        self.give_up()
        self._step = self._content
        return True

    def _begin_call(self, head: re.Match[str]) -> bool:
        self.take(head.end())
        self.begin(head[1])
        self._first = True
        self._step = self._argument
        return True

    def _argument(self) -> bool:
        """Takes the name of an argument, or the end of the call."""
        if not self.skip_space():
            return False
        if self.text[0] == ")":
            self.take(1)
            self.arguments("{}" if self._first else "}")
            self._step = self._next
        elif key := _KEY.match(self.text):
            self.take(key.end())
            self._before = f"{'{' if self._first else ', '}{json.dumps(key[1])}: "
            self._value, self._end = "", LiteralEnd()
            self._step = self._literal
        elif not self.last and _KEY_BEGUN.fullmatch(self.text):
            return False
        else:
            self._step = self._content
        return True

    def _literal(self) -> bool:
        """Takes the value of an argument."""
        end = self._end.feed(self.text)
        self._value += self.take(len(self.text) if end is None else end)
        if end is None:
            return False
        value = as_json(self._value)
        if value is None:
            self.opening = self._value
            self.give_up()
            self._step = self._content
        else:
            self.arguments(self._before + value)
            self._first = False
            self._step = self._argument
        return True

    def _next(self) -> bool:
        """Takes what is between two calls, or the end of the list."""
        if not self.skip_space():
            return False
        if self.text[0] == "]":
            self.take(1)
            self._step = self._between
        elif head := _NEXT.match(self.text):
            self._begin_call(head)
        elif not self.last and _NEXT_BEGUN.fullmatch(self.text):
            return False
        else:
            self._step = self._content
        return True


class LiteralEnd:
    """Finds where the value of a keyword argument ends: before a comma or bracket outside of strings and inner brackets."""

    def __init__(self) -> None:
        self._depth, self._quote, self._escaped = 0, "", False

    def feed(self, text: str) -> int | None:
        """Returns the index after the value; None if it goes on."""
        for index, character in enumerate(text):
            if self._quote:
                if self._escaped or character == "\\":
                    self._escaped = not self._escaped
                elif character == self._quote:
                    self._quote = ""
            elif character in "'\"":
                self._quote = character
            elif character in "([{":
                self._depth += 1
            elif character in ")]}":
                if not self._depth:
                    return index
                self._depth -= 1
            elif character == "," and not self._depth:
                return index
        return None


def as_json(literal: str) -> str | None:
    """Returns a literal of Python as JSON; None if it is none, or has no equal in JSON."""
    parts, position = list[str](), 0
    while position < len(literal):
        token = _TOKEN.match(literal, position)
        if not token:
            return None
        position = token.end()
        match token.lastgroup:
            case "string":
                parts.append(json.dumps(_ESCAPE.sub(_unescaped, token["string"][1:-1])))
            case "word":
                parts.append(_WORDS.get(token["word"], "?"))
            case "number":
                parts.append(token["number"])
            case _:
                mark = _BRACKETS.get(token["mark"], token["mark"])
                if mark in "]}" and parts and parts[-1] == ", ":
                    parts.pop()
                parts.append(mark if mark not in ",:" else f"{mark} ")
    text = "".join(parts)
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return None
    return text


def _unescaped(escape: re.Match[str]) -> str:
    code = escape[1] or escape[2]
    return chr(int(code, 16)) if code else _ESCAPED.get(escape[3], escape[0])


LLAMA4 = Family(
    name="llama4",
    calls=Llama4Calls,
    shape=LLAMA.shape,
    ends=("<|eot|>", "<|eom|>", "<|end_of_text|>"),
    special_tokens=True,
)
