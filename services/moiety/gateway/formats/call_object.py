"""Reads a tool call that is a JSON object with a name and arguments, character by character."""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import Enum, auto

from moiety.gateway.formats.tool import is_tool_name

NAME = "name"
ARGUMENTS = ("arguments", "parameters")
# An object that need not be a call is one only if its members are among these, up to where name and arguments are known.
_OTHER = ("type", "id", "function")


class JsonEnd:
    """Finds where a JSON value ends. Checks strings and the depth of brackets, nothing else."""

    def __init__(self) -> None:
        self._depth, self._string, self._escaped = 0, False, False

    def feed(self, text: str, start: int = 0) -> int | None:
        """Returns the index after the value's last character; None if the value goes on. White space may not come first."""
        for index in range(start, len(text)):
            character = text[index]
            if self._string:
                if self._escaped or character == "\\":
                    self._escaped = not self._escaped
                elif character == '"':
                    self._string = False
                    if not self._depth:
                        return index + 1
            elif character == '"':
                self._string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:  # below 0: the bracket ends what is around a number or a word
                    return index + 1 + self._depth
            elif not self._depth and (character == "," or character.isspace()):
                return index
        return None


class _Expects(Enum):
    OBJECT = auto()
    KEY = auto()
    REST_OF_KEY = auto()
    COLON = auto()
    VALUE = auto()
    REST_OF_VALUE = auto()
    COMMA = auto()


class CallObject:
    """One JSON object that may be a call, such as `{"name": "f", "arguments": {…}}`.

    The call begins once its name and the beginning of its arguments are known, and later members are skipped. Arguments
    inside a JSON string are taken out of it. `null` as arguments, or none at all, means `{}`. An object whose name no tool
    can have is no call.
    """

    def __init__(self, begin: Callable[[str], None], arguments: Callable[[str], None], *, certain: bool):
        """`certain`: the object is marked as a call. Otherwise it must have the members of a call, and no others."""
        self._begin, self._arguments, self._certain = begin, arguments, certain
        self._expects, self._value = _Expects.OBJECT, JsonEnd()
        self._key, self._part, self._name = "", "", ""
        self._early: str | None = None  # arguments that came before the name
        self._streaming = False  # whether the text goes out as arguments
        self.begun = False
        self.ended = False  # the object is complete, or is no call or no JSON from here on

    def feed(self, text: str) -> int:
        """Returns how many characters belong to the object."""
        index = 0
        while index < len(text) and not self.ended:
            if self._expects in (_Expects.REST_OF_KEY, _Expects.REST_OF_VALUE):
                end = self._value.feed(text, index)
                self._add(text[index:end])
                index = len(text) if end is None else end
                if end is not None:
                    self._close()
            elif text[index].isspace():
                index += 1
            else:
                index += self._structure(text[index])
        return index

    def _structure(self, character: str) -> int:
        """Handles a character between keys and values. Returns how many characters to go forward: 0 or 1."""
        match self._expects, character:
            case _Expects.OBJECT, "{":
                self._expects = _Expects.KEY
            case _Expects.KEY, '"':
                self._start(_Expects.REST_OF_KEY)
                return 0
            case ((_Expects.KEY | _Expects.COMMA), "}"):
                self._end_object()
            case _Expects.COLON, ":":
                self._expects = _Expects.VALUE
            case _Expects.VALUE, _ if character not in ",:}]":
                self._start(_Expects.REST_OF_VALUE)
                if character == "{" and self._key in ARGUMENTS and self._name and not self.begun:
                    self._begin_call()
                    self._streaming = True
                return 0
            case _Expects.COMMA, ",":
                self._expects = _Expects.KEY
            case _:
                self.ended = True
                return 0
        return 1

    def _start(self, expects: _Expects) -> None:
        self._expects, self._value, self._part = expects, JsonEnd(), ""

    def _begin_call(self) -> None:
        self._begin(self._name)
        self.begun = True

    def _add(self, text: str) -> None:
        if self._streaming:
            self._arguments(text)
        else:
            self._part += text

    def _close(self) -> None:
        """Ends a key or a value."""
        is_key = self._expects is _Expects.REST_OF_KEY
        self._expects = _Expects.COLON if is_key else _Expects.COMMA
        if self._streaming:
            self._streaming = False
            return
        try:
            value = json.loads(self._part, strict=False)
        except (ValueError, RecursionError):
            self.ended = True
            return
        if is_key:
            self._key = value
            known = (NAME, *ARGUMENTS, *_OTHER)
            self.ended = not (self._certain or self.begun or value in known)
        elif self._key == NAME and not self._name:
            self._name = value if isinstance(value, str) and is_tool_name(value) else ""
            self.ended = not self._name
        elif self._key in ARGUMENTS and self._early is None:
            self._early = "{}" if value is None else encodable(value) if isinstance(value, str) else self._part
            self.ended = not (self._certain or isinstance(value, dict | str | None))
        if self._name and self._early is not None and not self.begun and not self.ended:
            self._begin_call()
            self._arguments(self._early)

    def _end_object(self) -> None:
        self.ended = True
        if self._name and self._certain and not self.begun:
            self._begin_call()
            self._arguments("{}")


def encodable(text: str) -> str:
    """Returns the text with each half of a surrogate pair, which UTF-8 cannot encode, replaced by a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")
