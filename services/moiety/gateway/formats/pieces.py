"""The pieces into which an output's text is split, and the protocol of the parsers that split it."""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

_CHARACTERS = string.ascii_letters + string.digits

NewId = Callable[[], str]  # makes the id of a tool call


@dataclass(frozen=True, slots=True)
class Content:
    """A part of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A part of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegins:
    """A tool call begins. `index` counts the calls of one output from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A part of the JSON text of a call's arguments; all parts of one `index`, joined, are the arguments."""

    index: int
    text: str


Piece = Content | Reasoning | CallBegins | CallArguments


class OutputParser(Protocol):
    """Splits the text of one output. How the text is cut into pushes makes no difference to the joined pieces.

    No text raises an error. An output that breaks off, or is no valid call, becomes pieces as the format's parser says.
    """

    def push(self, text: str) -> list[Piece]:
        """Takes the next part of the text; returns the pieces that later text cannot change."""
        ...

    def end(self) -> list[Piece]:
        """Returns what was held back. Nothing may be pushed after it."""
        ...


def call_id() -> str:
    """Returns a random id for a tool call, of the form that OpenAI's API has."""
    return "call_" + "".join(secrets.choice(_CHARACTERS) for _ in range(24))


def joined(pieces: Iterable[Piece]) -> list[Piece]:
    """Returns the pieces with neighbours of one kind joined: what does not depend on how the text was cut."""
    result: list[Piece] = []
    for piece in pieces:
        match result[-1] if result else None, piece:
            case Content(before), Content(text):
                result[-1] = Content(before + text)
            case Reasoning(before), Reasoning(text):
                result[-1] = Reasoning(before + text)
            case CallArguments(index, before), CallArguments(other, text) if index == other:
                result[-1] = CallArguments(index, before + text)
            case _:
                result.append(piece)
    return result
