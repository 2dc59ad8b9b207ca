"""Opens the files of a checkpoint, and says what is wrong with one: it is something else, it cannot be read, it is damaged.

Imports no torch.
"""

from __future__ import annotations

import errno
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from moiety.errors import CheckpointError, shown

AGAIN = "copy it from its publisher again"
POINTER = b"version https://git-lfs"  # how a file of Git LFS begins where its content was not fetched
_KINDS = {list: "a list", str: "a string", type(None): "null", bool: "true or false"}


def present(file: Path) -> bool:
    """Returns whether there is a file; raises CheckpointError if there is something else, such as a folder."""
    what = instead_of_file(file)
    if what in (None, "is missing"):
        return what is None
    raise CheckpointError(f"{file}: {what}: {AGAIN}")


def instead_of_file(path: Path) -> str | None:
    """Returns what is at `path` in place of a file, for "PATH …": it is missing, is a folder, …; None if it is a file."""
    try:
        if path.is_dir():
            return "is a folder, not a file"
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: no path can have a NUL in it
        return f"is a symbolic link to {os.readlink(path)}, which is missing" if path.is_symlink() else "is missing"
    except OSError as error:
        return "is a symbolic link that leads back to itself" if error.errno == errno.ELOOP else unreadable(error)
    return None if path.is_file() else "is no regular file"


def unreadable(error: OSError) -> str:
    """Returns why a file cannot be read, for "PATH …"."""
    rights = ", the rights of this user do not suffice" if error.errno in (errno.EACCES, errno.EPERM) else ""
    return f"cannot be read: {error.strerror}{rights}"


def is_pointer(file: Path) -> bool:
    """Returns whether a file is what Git LFS leaves where it has not fetched the content."""
    with suppress(OSError), file.open("rb") as stream:
        return stream.read(len(POINTER)) == POINTER
    return False


def read_json(file: Path, *, needed: bool = True, once: bool = False) -> dict[str, Any]:
    """Reads the JSON object in `file`. Raises CheckpointError if there is no such file, or if it holds anything else.

    `needed`: nothing can be served without the file. `once`: it may not state a key twice.
    """
    if what := instead_of_file(file):
        raise CheckpointError(f"{file}: {what}: {AGAIN}")
    try:
        content = file.read_bytes()
        if not content.strip():
            raise CheckpointError(f"{file}: is empty: {AGAIN}" + ("" if needed else ", or remove it if there is none"))
        if content.startswith(POINTER):
            raise CheckpointError(f"{file}: is a pointer of Git LFS, not the file: run `git lfs pull` in its folder")
        data = parsed(content, once=once)
    except OSError as error:
        raise CheckpointError(f"{file}: {unreadable(error)}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not readable as JSON: {damage(error)}: {AGAIN}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file}: holds {_KINDS.get(type(data), 'a number')} instead of a JSON object: {AGAIN}")
    return data


class _Twice(ValueError):
    """A JSON object states a key twice, with two values."""


def parsed(content: bytes, *, once: bool = False) -> Any:
    """Parses JSON. `once`: a key that an object states twice, with two values, is refused; else its last value counts.

    Raises ValueError or RecursionError; `damage` says which.
    """
    return json.loads(content.decode("utf-8"), object_pairs_hook=_stated_once if once else None)


def damage(error: Exception) -> str:
    """Says in words what a parser of JSON stumbled over."""
    if isinstance(error, json.JSONDecodeError):
        return f"damaged at line {error.lineno}, column {error.colno}"
    if isinstance(error, UnicodeDecodeError):
        return f"its byte {error.start + 1} is not UTF-8"
    if isinstance(error, _Twice):
        return str(error)
    return "it nests too deep" if isinstance(error, RecursionError) else "it holds a number with too many digits"


def _stated_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    stated = dict(pairs)
    if len(stated) < len(pairs):
        for key, value in pairs:
            if value != stated[key]:
                raise _Twice(f"it states {key} twice, as {shown(value)} and as {shown(stated[key])}")
    return stated
