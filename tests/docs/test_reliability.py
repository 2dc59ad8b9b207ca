"""docs/reliability.md names tests and kinds of faults that exist, and every kind of fault."""

from __future__ import annotations

import re
from pathlib import Path

from moiety.tools.chaos.kinds import KINDS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text("utf-8")
ROWS = [[cell.strip() for cell in line.strip("| ").split("|")] for line in PAGE.splitlines() if line.startswith("|")]
TEST = re.compile(r"`([\w/]+\.py)(?:::(\w+))?`")
KIND = re.compile(r"`([a-z]+-[a-z*]+)`")
NAMES = {kind.name for kind in KINDS}


def survived() -> list[list[str]]:
    """Returns the rows of the tables whose last column names tests."""
    headers = [index for index, row in enumerate(ROWS) if row[-1] == "test"]
    rows = []
    for start in headers:
        for row in ROWS[start + 2 :]:
            if len(row) != len(ROWS[start]) or row[-1] == "test":
                break
            rows.append(row)
    return rows


def test_every_line_names_a_test_or_a_trial() -> None:
    """Each line says in its last cell which test, or which kind of fault of `moiety chaos`, shows it."""
    assert len(survived()) > 20
    unproved = [row[0] for row in survived() if not TEST.search(row[-1]) and not KIND.search(row[-1])]
    assert not unproved


def test_named_tests_exist() -> None:
    """A named test file exists below tests/, and has the function that is named after `::`."""
    missing = []
    for file, function in TEST.findall(PAGE):
        found = [path for path in (ROOT / "tests").rglob(Path(file).name) if str(path).endswith(f"/{file}")]
        if not found or (function and f"def {function}(" not in found[0].read_text("utf-8")):
            missing.append(f"{file}::{function}" if function else file)
    assert not missing


def test_named_kinds_are_the_kinds_of_the_command() -> None:
    """The table names every kind of fault of `moiety chaos` once, alone or as FAMILY-*, and no other."""
    named = {name for row in survived() for name in KIND.findall(row[-1])}
    families = {name.removesuffix("-*") for name in named if name.endswith("-*")}
    single = {name for name in named if not name.endswith("-*")}
    assert single <= NAMES
    assert families <= {kind.family for kind in KINDS}
    assert {kind.name for kind in KINDS if kind.family not in families} <= single
