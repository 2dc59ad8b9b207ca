"""Scripts of sh, bash, bats and zsh."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from moiety.training.cleaning import documents
from moiety.training.cleaning.documents import names_reciprocal_licence, read

_LICENCE = re.compile(r"copyright|licen[sc]e", re.I)
_OTHER_PROGRAM = re.compile(r"#!(?!.*\b(sh|ash|bash|dash|ksh|zsh|bats)\b)")
_SMALLEST, _LARGEST = 80, 400_000  # characters


def without_licence(text: str) -> str:
    """Returns a script without the comments after its first line, if they are about its licence."""
    return documents.without_licence(text, _LICENCE, first=int(text.startswith("#!")))


def clean(files: Sequence[Path]) -> Iterator[str]:
    """Yields the scripts that are text for a shell and name no reciprocal licence."""
    for file in files:
        text = read(file)
        is_script = not {"\0", "\ufffd"} & set(text) and not _OTHER_PROGRAM.match(text)
        if is_script and _SMALLEST < len(text) < _LARGEST and not names_reciprocal_licence(text):
            yield re.sub(r"\n{3,}", "\n\n", without_licence(text))
