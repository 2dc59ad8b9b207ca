"""What Markdown files tell a reader to type exists: commands, options, settings, make's targets, chart values; code parses."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import click
import pytest
import yaml
from markdown_blocks import ROOT, Block, all_blocks, blocks, pages, spans

from moiety.cli.main import cli
from moiety.config.catalogue import catalogue

BLOCKS = all_blocks()
SHELL = ("console", "sh")
SETTINGS = {setting.name for setting in catalogue()}
END_OF_COMMAND = re.compile(r"[|;&<>]+")


def commands(script: str) -> Iterator[list[str]]:
    """Yields the commands of a shell script as words: without comments, split at pipes, lists and redirections."""
    for line in script.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|;&<>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in lexer:
            if END_OF_COMMAND.fullmatch(word):
                yield words
                words = []
            else:
                words.append(word)
        yield words


def refused(words: list[str]) -> str:
    """Says what is wrong with a `moiety` command, or nothing.

    Names are checked, values are not: they may be placeholders, and a sentence may leave them out. So may `COMMAND` be.
    """
    command: click.Command = cli
    rest = words[1:]
    context = click.Context(cli, info_name="moiety")
    try:
        while isinstance(command, click.Group):
            _, rest, _ = command.make_parser(context).parse_args(list(rest))
            if not rest or rest[0].isupper():
                return ""
            name, *rest = rest
            if (found := command.get_command(context, name)) is None:
                return f"{shlex.join(words)}: no command {name!r}"
            command, context = found, click.Context(found, info_name=name, parent=context)
        values, _, _ = command.make_parser(context).parse_args(list(rest))
        for assignment in values.get("assignments") or ():
            name = re.sub(r"^overrides\.[^.]+\.", "experts.", assignment.partition("=")[0])
            if name not in SETTINGS:
                return f"{shlex.join(words)}: no setting {name}"
    except click.BadOptionUsage:
        return ""
    except click.UsageError as error:
        return f"{shlex.join(words)}: {error.message}"
    return ""


def has_key(values: Any, path: list[str]) -> bool:
    """Returns whether nested mappings have the keys `path`."""
    return not path or (isinstance(values, dict) and path[0] in values and has_key(values[path[0]], path[1:]))


def problems(script: str) -> list[str]:
    """Returns what the commands of a shell script name that does not exist."""
    found = []
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    values = yaml.safe_load((ROOT / "helm" / "moiety" / "values.yaml").read_text("utf-8"))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    for words in commands(script):
        if "moiety" in words[:1]:
            found += [refused(words)]
        if "make" in words[:1]:
            found += [f"make {each}: no such target" for each in words[1:] if "=" not in each and each not in targets]
        if "helm" in words[:1]:
            keys = [after.partition("=")[0] for word, after in pairwise(words) if word == "--set"]
            found += [f"{shlex.join(words)}: no value {key}" for key in keys if not has_key(values, key.split("."))]
        if words[:2] == ["pip", "install"]:
            named = [
                name for word in words for match in re.findall(r"\[([\w,]+)\]$", word) for name in match.split(",")
            ]
            found += [f"{shlex.join(words)}: no extra {name!r}" for name in named if name not in extras]
    return [each for each in found if each]


def shell_error(text: str) -> str:
    """Returns what bash says about the syntax of `text`, without running it."""
    return subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False).stderr


PARSERS: dict[str, Callable[[str], object]] = {
    "": str,  # what a command printed
    "python": lambda text: compile(text, "block", "exec"),
    "yaml": yaml.safe_load,
    "json": json.loads,
    "toml": tomllib.loads,
}


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_parses(block: Block) -> None:
    """A block's language is one that is checked here, its text parses, and the commands in it exist."""
    if block.language in SHELL:
        assert block.script.strip(), "a console block has commands, each behind `$ `"
        assert shell_error(block.script) == ""
        assert problems(block.script) == []
    else:
        PARSERS[block.language](block.text)


@pytest.mark.parametrize("page", pages())
def test_commands_in_the_text_exist(page: str) -> None:
    """A `moiety` or `make` command in a sentence has a name and options that exist; blocks are apart."""
    text = (ROOT / page).read_text("utf-8")
    named = [span for span in spans(text) if re.match(r"(moiety|make|pip install) \S", span)]
    assert [problem for span in named for problem in problems(span)] == []


def test_what_is_wrong_is_found() -> None:
    """Names of commands, options, settings, targets, extras and chart values that do not exist are each reported."""
    script = (
        "moiety inspekt x && moiety serve x --grups 3  # comment\necho x | moiety bench hopp\n"
        "moiety serve x --set router.slotz=3\nmake demmo\npip install '.[srve]'\n"
        "helm install chat helm/moiety --set model.foldr=x --set model.folder=x\n"
    )
    assert len(problems(script)) == 7
    assert problems("moiety --log-level debug serve FOLDER_OR_ID --groups 4 --set router.slots=3 | head") == []
    assert shell_error("echo 'x")


def test_markers_and_prompts_are_read() -> None:
    """A marker belongs to the next line's block, output is no command, and a marker that marks nothing is an error."""
    page = '<!-- run until "ready" -->\n```console\n$ one \\\n    two\noutput\n$ three\n```\n\n```python\nx = 1\n```\n'
    first, second = blocks("page", page)
    assert first.marker is not None
    assert (first.line, first.marker.until, first.marker.slow, second.marker) == (2, "ready", True, None)
    assert first.script == "one \\\n    two\nthree\n"
    for wrong in ("<!-- run -->\n\n```sh\nx\n```\n", "<!-- run fast -->\n```sh\nx\n```\n"):
        with pytest.raises(ValueError, match="marker"):
            blocks("page", wrong)
