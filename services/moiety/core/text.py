"""Text from people and for people: what UTF-8 cannot express, what a terminal may get, which word may be meant."""

from __future__ import annotations

import os
from collections.abc import Iterable
from difflib import get_close_matches

# A terminal must not be commanded by what a model or a server writes: control characters but tab and line feed.
_CONTROLS = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}
# The least ratio of difflib at which a word may be meant. Kubernetes sets MOIETY_SERVICE_HOST for a Service called moiety: it
# must not resemble the setting advertise_host, at 0.69.
_NEAR = 0.7


def for_terminal(text: str) -> str:
    """Returns `text` with U+FFFD in the place of control characters other than tab and line feed."""
    return text.translate(_CONTROLS)


def not_utf8(text: str) -> str | None:
    """Returns what in `text` UTF-8 cannot express: a byte of an argument or file in another encoding, or half a character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code, place = ord(text[error.start]), error.start + 1
        if 0xDC80 <= code <= 0xDCFF:  # Python's stand-in for a byte, PEP 383
            return f"character {place} is the byte 0x{code - 0xDC00:02x}, which is not UTF-8"
        return f"character {place} is U+{code:04X}, one half of a surrogate pair"
    return None


def reason_of(error: OSError) -> str:
    """Returns the system's words for an error, such as "Connection refused"; asyncio puts others in their place."""
    if error.errno is not None and error.errno > 0:  # those of name resolution are negative
        return os.strerror(error.errno)
    return error.strerror or str(error)


def size(count: int, digits: int = 1) -> str:
    """Returns a number of bytes in words, with as many digits behind the point."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.{digits}f} {name}"
    return f"{count} bytes"


def similar(word: str, known: Iterable[str], most: int = 3) -> list[str]:
    """Returns those of the `known` words that may be meant by `word`, upper and lower case being one.

    The word itself, else those that begin with it, the shortest first, else the nearest.
    """
    by_fold, word = {each.casefold(): each for each in known}, word.casefold()
    longer = sorted((each for each in by_fold if word and each.startswith(word)), key=len)[:most]
    near = [word] if word in by_fold else longer or get_close_matches(word, by_fold, n=most, cutoff=_NEAR)
    return [by_fold[each] for each in near]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns "; did you mean …?" with the nearest of the `known` words; nothing if none is near."""
    near = similar(word, known, most=1)
    return f"; did you mean {near[0]!r}?" if near else ""
