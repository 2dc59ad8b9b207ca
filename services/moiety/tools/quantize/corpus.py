"""Calibration and training text that ships with Python: docstrings of the standard library, English with some code."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

MODULES = (
    *(
        "argparse",
        "ast",
        "asyncio/base_events",
        "bdb",
        "calendar",
        "cmd",
        "codecs",
        "collections/__init__",
        "configparser",
    ),
    *(
        "contextlib",
        "csv",
        "datetime",
        "decimal",
        "difflib",
        "doctest",
        "email/message",
        "enum",
        "fractions",
        "functools",
    ),
    *("heapq", "http/client", "inspect", "json/__init__", "logging/__init__", "mailbox", "optparse", "pdb", "pickle"),
    *(
        "random",
        "shutil",
        "smtplib",
        "statistics",
        "string",
        "subprocess",
        "tarfile",
        "tempfile",
        "textwrap",
        "threading",
    ),
    *(
        "tokenize",
        "traceback",
        "turtle",
        "typing",
        "unittest/case",
        "unittest/mock",
        "urllib/request",
        "uuid",
        "zipfile",
    ),
)


def shipped_text() -> str:
    """Returns the docstrings of MODULES above 80 characters as one text. The text depends only on the release of Python."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [library / f"{module}.py" for module in MODULES]
    documents = [text for file in files if file.is_file() for text in _docstrings(file)]
    # Spread, so that every part of the text draws on many modules.
    return "\n\n".join(documents[start] for start in _spread(len(documents)))


def _docstrings(file: Path) -> Iterator[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) > 80:
                yield text


def _spread(count: int) -> Iterator[int]:
    """Yields the integers 0 to `count` - 1 once each, in steps of about 1000 modulo `count`."""
    step = next(step for step in (997, 1009, 1013) if count % step) if count else 1
    yield from ((place * step) % count for place in range(count))
