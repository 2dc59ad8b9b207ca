"""Examples of commands, each with a sentence that says what it does."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from moiety.training.cleaning.documents import read, squeeze

_RESULT = re.compile(
    r"\s*(\*\*)?(Sample )?(Outputs?|Contents? of|Response|Results?|The following .*output)\b[^.]*::?\s*(\*\*)?$", re.I
)
_LINK = re.compile(r"`([^`<]*?)\s*<[^`]*>`_+")


def without_results(text: str) -> str:
    """Returns a reStructuredText of examples as plain text, without what the commands print."""
    kept: list[str] = []
    in_result = False
    for line in text.replace("\t", "    ").split("\n"):
        if _RESULT.match(line):
            in_result = True
        if in_result and (not line.strip() or line.startswith(" ") or _RESULT.match(line)):
            continue
        in_result = False
        if re.match(r"\s*[{}\[\]\"]", line) or "For more information, see" in line or "produces no output" in line:
            continue
        line = _LINK.sub(r"\1", line).replace("``", "`")
        line = re.sub(r"\*\*(.*?)\*\*", r"\1", line)
        kept.append(re.sub(r"\s*::?\s*$", ":", line).rstrip())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()


def clean_rst(files: Sequence[Path]) -> Iterator[str]:
    """Yields the examples of each file."""
    yield from (without_results(read(file)) for file in files)


def clean_help(files: Sequence[Path]) -> Iterator[str]:
    """Yields the help of each command in modules that assign YAML texts to names: `helps["group command"] = '''…'''`."""
    for file in files:
        for node in ast.walk(ast.parse(read(file))):
            match node:
                case ast.Assign(
                    targets=[ast.Subscript(slice=ast.Constant(value=str(command)))], value=ast.Constant(value=str(text))
                ):
                    try:
                        entry = yaml.safe_load(text)
                    except yaml.YAMLError:
                        continue
                    if isinstance(entry, dict) and entry.get("type") == "command" and entry.get("examples"):
                        yield _as_comments(command, entry)


def _as_comments(command: str, entry: dict[str, Any]) -> str:
    """Returns commands, each below comments that say what it does."""
    lines = [f"# az {command}: {squeeze(str(entry.get('short-summary', '')))}"]
    for example in entry["examples"]:
        lines += ["", f"# {squeeze(str(example.get('name', '')))}", str(example.get("text", "")).strip()]
    return "\n".join(lines)
