"""Links in Markdown, and files named in Markdown, docstrings and comments, must exist in the repository."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
MARKDOWN = [path for path in TRACKED if path.endswith(".md")]
SOURCES = [path for path in TRACKED if path.endswith((".py", ".proto", ".cpp", ".h", ".yaml")) and "_pb2" not in path]
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")
FILE = re.compile(r"`([\w./-]+\.(?:py|md|proto|cpp|h|toml|tpl))(?::\w+)?`")


def named_files(text: str) -> Iterator[str]:
    """Yields the files that `text` names in backticks, without globs and placeholders."""
    for match in FILE.finditer(text):
        if not any(sign in match[1] for sign in "*{<"):
            yield match[1]


@pytest.mark.parametrize("path", MARKDOWN)
def test_every_link_has_a_target(path: str) -> None:
    """Every relative link in a Markdown file leads to a file or folder of the repository."""
    text = (ROOT / path).read_text("utf-8")
    links = [match[1] for match in LINK.finditer(text) if "://" not in match[1] and not match[1].startswith("mailto:")]
    missing = [link for link in links if not (ROOT / path).parent.joinpath(link).exists()]
    assert not missing


def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_every_anchor_is_a_heading() -> None:
    """A link to a part of a page of this repository, such as page.md#part, names a heading of that page."""
    missing = []
    for path in MARKDOWN:
        page = ROOT / path
        for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", page.read_text("utf-8")):
            other = page.parent / target if target else page
            if "://" not in target and other.suffix == ".md" and anchor not in anchors(other):
                missing.append(f"{path}: {target}#{anchor}")
    assert not missing


def test_every_named_file_exists() -> None:
    """A file named in backticks, with or without its folders, is the end of a tracked file's path."""
    ends = {"/".join(parts[start:]) for parts in (path.split("/") for path in TRACKED) for start in range(len(parts))}
    others = {"integrations/moe.py"}  # files of other projects

    def known(path: str, name: str) -> bool:
        """A bare name in a folder's README is a file below that folder, or in one of the folders above it."""
        if path.endswith("/README.md") and "/" not in name:
            above = {str(folder / name) for folder in Path(path).parents}
            below = path.removesuffix("README.md")
            return any(each in above or (each.startswith(below) and each.endswith(f"/{name}")) for each in TRACKED)
        return name.removeprefix("./") in ends | others

    missing = {
        f"{path}: {name}"
        for path in MARKDOWN + SOURCES
        for name in named_files((ROOT / path).read_text("utf-8"))
        if not known(path, name)
    }
    assert not sorted(missing)
