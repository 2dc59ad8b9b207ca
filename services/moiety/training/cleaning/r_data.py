"""Books that an R package holds as vectors of lines in its lazy-load database → their paragraphs.

The database (.rdb) is a row of records: a uint32 (big-endian), the size of what follows when inflated, and a zlib stream.
Inflated, a record is R's serialisation in XDR: a vector of strings has the flags 16, its length, and for each string flags
whose lowest byte is 9, its size (-1 = none) and its bytes. Source: "R Internals", section 1.8.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from moiety.training.cleaning.documents import joined, squeeze

_STRINGS, _STRING = struct.pack(">i", 16), 9
_FEWEST = 100  # strings of a vector that is a book


def records(database: bytes) -> Iterator[bytes]:
    """Yields the inflated records of a database. Raises ValueError for one that is not compressed by zlib."""
    start = 0
    while start < len(database):
        (size,) = struct.unpack_from(">I", database, start)
        stream = zlib.decompressobj()
        try:
            inflated = stream.decompress(database[start + 4 :])
        except zlib.error as error:
            raise ValueError(f"the record at byte {start} is not compressed by zlib: {error}") from error
        if len(inflated) != size:
            raise ValueError(f"the record at byte {start} inflates to {len(inflated)} bytes instead of {size}")
        yield inflated
        start = len(database) - len(stream.unused_data)


def strings(record: bytes) -> list[str]:
    """Returns the longest vector of strings of a record; empty if it has none of at least 100."""
    best: list[str] = []
    for match in re.finditer(re.escape(_STRINGS), record):
        (count,) = struct.unpack_from(">i", record, match.end()) if match.end() + 4 <= len(record) else (0,)
        if count >= _FEWEST and (found := _vector(record, match.end() + 4, count)) and len(found) > len(best):
            best = found
    return best


def _vector(record: bytes, place: int, count: int) -> list[str]:
    """Returns `count` strings from `place` on; empty if something else stands there."""
    found = []
    for _ in range(count):
        if place + 8 > len(record):
            return []
        flags, size = struct.unpack_from(">ii", record, place)
        if flags & 0xFF != _STRING or size < -1:
            return []
        place += 8
        found.append(record[place : place + max(size, 0)].decode("utf-8", "replace"))
        place += max(size, 0)
    return found


def clean(files: Sequence[Path]) -> Iterator[str]:
    """Yields the books of each database: paragraphs are what stands between empty lines."""
    for file in files:
        for record in records(file.read_bytes()):
            if lines := strings(record):
                paragraphs = (squeeze(part) for part in re.split(r"\n\s*\n", "\n".join(lines)))
                yield joined(paragraph for paragraph in paragraphs if paragraph)
