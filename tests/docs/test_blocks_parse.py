"""What Markdown files tell a reader to type exists: commands, options, settings, make's targets, chart values; code parses."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from collections.abc import Callable

import pytest
import yaml
from markdown_blocks import ROOT, Block, all_blocks, blocks, pages, spans
from typed_commands import problems

BLOCKS = all_blocks()
SHELL = ("console", "sh")


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


def test_commands_in_sentences_exist() -> None:
    """Commands in the text between blocks have names and options that exist."""
    found = [
        f"{page}: {problem}"
        for page in pages()
        for span in spans((ROOT / page).read_text("utf-8"))
        if re.match(r"(moiety|make|pip install|\S*python -m) \S", span)
        for problem in problems(span)
    ]
    assert found == []


def test_what_is_wrong_is_found() -> None:
    """Names of commands, options, settings, targets, extras, modules and chart values that do not exist are reported."""
    script = (
        "moiety inspekt x && moiety serve x --grups 3  # comment\necho x | moiety bench hopp\n"
        "moiety serve x --set router.slotz=3\nPYTHON=python3 make demmo\npip install '.[srve]'\n"
        ".venv/bin/python -m moiety.klient\nhelm install chat helm/moiety --set model.foldr=x --set model.folder=x\n"
    )
    assert len(problems(script)) == 8
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
