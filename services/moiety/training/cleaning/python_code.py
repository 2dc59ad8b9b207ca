"""Python modules that a person wrote to be read: no tests, tables of data, generated or copied modules."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from moiety.training.cleaning import documents
from moiety.training.cleaning.documents import names_reciprocal_licence, read

_LEFT_OUT = re.compile(
    r"/(tests?|testing|_vendor|vendored|locale|externals|unicode_data|idlelib|lib2to3|encodings|distutils|ensurepip"
    r"|turtledemo|_generated|pydoc_data|benchmarks?)/|/test_[^/]*$|_tests?\.py$|_pb2\.py$|emoji_codes|_cell_widths"
    r"|mime_types|_array_api"
)
_LICENCE = re.compile(r"copyright|licen[sc]e|coding[:=]", re.I)
_SMALLEST, _LARGEST = 400, 300_000  # characters
_LONGEST_LINE, _MEAN_LINE = 400, 75  # characters
_DIGITS, _FOREIGN = 0.12, 0.02  # shares of characters


def without_licence(text: str) -> str:
    """Returns a module without the comments at its top, if they are about its licence."""
    return documents.without_licence(text, _LICENCE)


def is_readable(text: str) -> bool:
    """Whether a text is Python code of ordinary size and line length that is not mostly numbers or foreign letters."""
    if not _SMALLEST < len(text) < _LARGEST:
        return False
    lengths = [len(line) for line in text.split("\n")]
    return (
        max(lengths) <= _LONGEST_LINE
        and sum(lengths) <= _MEAN_LINE * len(lengths)
        and sum(letter.isdigit() for letter in text) <= _DIGITS * len(text)
        and sum(letter > "\x7f" for letter in text) <= _FOREIGN * len(text)
        and _parses(text)
    )


def _parses(text: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd escapes in other people's strings
        try:
            ast.parse(text)
        except (SyntaxError, ValueError):
            return False
    return True


def clean(files: Sequence[Path]) -> Iterator[str]:
    """Yields the modules that are worth reading."""
    for file in files:
        if _LEFT_OUT.search(file.as_posix()):
            continue
        text = read(file)
        if not names_reciprocal_licence(text) and is_readable(module := without_licence(text)):
            yield module
