"""What the commands that pages tell a reader to type name, and which of it does not exist. Nothing is run."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import click
import yaml
from markdown_blocks import ROOT

from moiety.cli.main import cli
from moiety.config.catalogue import catalogue

END_OF_COMMAND = re.compile(r"[|;&<>]+")


def problems(script: str) -> list[str]:
    """Returns what is named in the commands of a shell script and does not exist."""
    found = []
    for words in _commands(script):
        program = Path(words[0]).name if words else ""
        if program in _CHECKS:
            found += [f"{shlex.join(words)}: {problem}" for problem in _CHECKS[program](words[1:])]
    return found


def _commands(script: str) -> Iterator[list[str]]:
    """Yields the commands of `script` as words: split at pipes, lists and redirections, without comments and assignments."""
    for line in script.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|;&<>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in lexer:
            if END_OF_COMMAND.fullmatch(word):
                yield words
                words = []
            elif words or not re.match(r"\w+=", word):
                words.append(word)
        yield words


def _moiety(words: list[str]) -> Iterator[str]:
    """Commands, options and settings. Values are not checked: they may be placeholders, and a sentence may leave them out."""
    command: click.Command = cli
    context = click.Context(cli, info_name="moiety")
    try:
        while isinstance(command, click.Group):
            _, words, _ = command.make_parser(context).parse_args(list(words))
            if not words or words[0].isupper():  # COMMAND
                return
            name, *words = words
            if (found := command.get_command(context, name)) is None:
                yield f"no command {name}"
                return
            command, context = found, click.Context(found, info_name=name, parent=context)
        values, _, _ = command.make_parser(context).parse_args(list(words))
    except click.BadOptionUsage:  # the sentence leaves out the option's value
        return
    except click.UsageError as error:
        yield error.message
        return
    settings = {setting.name for setting in catalogue()}
    for assignment in values.get("assignments") or ():
        name = re.sub(r"^overrides\.[^.]+\.", "experts.", assignment.partition("=")[0])
        if name not in settings:
            yield f"no setting {name}"


def _make(words: list[str]) -> Iterator[str]:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    yield from (f"no target {word}" for word in words if "=" not in word and word not in targets)


def _helm(words: list[str]) -> Iterator[str]:
    values = yaml.safe_load((ROOT / "helm" / "moiety" / "values.yaml").read_text("utf-8"))
    keys = [after.partition("=")[0] for word, after in pairwise(words) if word == "--set"]
    yield from (f"no value {key}" for key in keys if not _has(values, key.split(".")))


def _has(values: Any, path: list[str]) -> bool:
    return not path or (isinstance(values, dict) and path[0] in values and _has(values[path[0]], path[1:]))


def _pip(words: list[str]) -> Iterator[str]:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    named = [name for word in words for match in re.findall(r"\[([\w,]+)\]$", word) for name in match.split(",")]
    yield from (f"no extra {name}" for name in named if name not in extras)


def _python(words: list[str]) -> Iterator[str]:
    if words[:1] == ["-m"] and len(words) > 1:
        try:
            found = find_spec(words[1])
        except ModuleNotFoundError:  # its package is missing
            found = None
        if found is None:
            yield f"no module {words[1]}"


_CHECKS: Mapping[str, Callable[[list[str]], Iterator[str]]] = MappingProxyType(
    {"moiety": _moiety, "make": _make, "helm": _helm, "pip": _pip, "python": _python, "python3": _python}
)
