"""Reads YAML that a person wrote, for settings: what could be misread is refused, with the place and what to write instead.

It is the core of YAML 1.2, where only true, false, null and numbers are no texts: `no`, 1:30 and 2026-01-01 stay as written.
"""

from __future__ import annotations

import re
from typing import Any, NoReturn

import yaml
from yaml.nodes import CollectionNode, MappingNode, Node, ScalarNode

MOST_DEPTH = 16  # settings nest four deep
MOST_NODES = 100_000  # an alias counts as much as what it repeats: ten lines can stand for billions of values
_TEXT, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
# What to do about a character that stands where it must not. The parser's own words quote the file.
_ADVICE = {
    "\t": "indent with spaces, not tabs",
    ":": 'check the indentation, and put a text with ": " inside in quotes',
    "*": "no anchor has the name of this alias; put a text that begins with * in quotes",
    "&": "another anchor has this name",
    **{sign: f"put a text that begins with {sign} in quotes" for sign in "%@`"},
}


class NotRead(ValueError):
    """A text is not YAML, or more than settings need. Of the text, the message quotes names only: it may hold a password."""


def from_yaml(text: str) -> Any:
    """Returns the value that `text` stands for; None for an empty one. Raises NotRead."""
    try:
        return yaml.load(text, _Loader)
    except yaml.reader.ReaderError as error:
        raise NotRead(f"its character {error.position + 1}, U+{error.character:04X}, may not stand in YAML") from None
    except yaml.MarkedYAMLError as error:
        mark: Any = error.problem_mark or error.context_mark
        there = mark.buffer[mark.pointer]  # ends with NUL
        why = _ADVICE.get(there, "check the indentation, the brackets and the quotes up to there")
        _refuse(mark, f"not YAML: {why}")


class _Loader(yaml.SafeLoader):
    """As yaml.SafeLoader, with the types of YAML 1.2's core, and bounds."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 -- instead of those of YAML 1.1; filled below

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._nodes = 0
        self._sizes: dict[int, int] = {}  # nodes in each complete collection, by its id

    def get_single_node(self) -> Node | None:
        node: Node | None = self.get_node() if self.check_node() else None
        if self.check_node():
            _refuse(self.peek_event().start_mark, "a second document begins; write all into one, without ---")
        return node

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        event, before = self.peek_event(), self._nodes
        if isinstance(event, yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if isinstance(node, CollectionNode) and id(node) not in self._sizes:
                _refuse(event.start_mark, "an alias stands inside its own anchor, so the value would hold itself")
            self._count(event, self._sizes.get(id(node), 1))
            return node
        if event.tag not in (None, "!", _TEXT):
            _refuse(event.start_mark, "settings have no tags; put a text that begins with ! in quotes")
        if self._depth == MOST_DEPTH:
            _refuse(event.start_mark, f"nests too deep; at most {MOST_DEPTH} levels are read")
        self._count(event, 1)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(node, CollectionNode):
            self._sizes[id(node)] = self._nodes - before
        if isinstance(node, MappingNode):
            _check_names(node)
        return node

    def construct_object(self, node: Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:  # Python reads no number of thousands of digits
            if isinstance(error, NotRead):
                raise
            _refuse(node.start_mark, "a number with too many digits")

    def _count(self, event: yaml.Event, nodes: int) -> None:
        self._nodes += nodes
        if self._nodes > MOST_NODES:
            _refuse(event.start_mark, f"more than {MOST_NODES} values, counted with those that aliases repeat")


# `010` stays a text, which is 10 where a number is wanted: for YAML 1.1 it was 8. So does 0x with more than 16 digits: Python
# may read such a number and then refuse to write it into an error.
for _type, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("int", r"[-+]?(0|[1-9][0-9]*|0o[0-7]{1,24}|0x[0-9a-fA-F]{1,16})", [*"-+0123456789"]),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?", [*"-+.0123456789"]),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", [*"-+."]),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_type}", re.compile(f"^(?:{_pattern})$"), _first)


def _check_names(mapping: MappingNode) -> None:
    names: set[str] = set()
    for name, _ in mapping.value:
        if not isinstance(name, ScalarNode) or name.tag not in (_TEXT, _MERGE):
            _refuse(name.start_mark, "the name of a setting must be a text; put a number in quotes")
        if name.value in names:
            _refuse(name.start_mark, f"{name.value[:80]!r} stands here a second time; keep one of the two")
        names.add(name.value)


def _refuse(mark: Any, why: str) -> NoReturn:
    raise NotRead(f"line {mark.line + 1}, column {mark.column + 1}: {why}")
