"""The files that a batch's results are appended to. They are also what a later run goes on from."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from moiety.errors import FailedPrecondition, InvalidRequest
from moiety.tools.batch.lines import json_lines, key_of

ID_PREFIX = "batch_req_"
_BEGINS = f'{{"id": "{ID_PREFIX}'.encode()  # every line that `append` writes


class ResultFile:
    """One file of results, locked against a second run while it is open. A context manager."""

    def __init__(self, file: Path) -> None:
        """Creates the file where there is none. Raises FailedPrecondition if it cannot be written or another run has it."""
        self.file = file
        try:
            self._raw = file.open("ab", buffering=0)
            try:
                fcntl.flock(self._raw, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._raw.close()
                raise FailedPrecondition(f"{file}: another run writes to it") from None
        except OSError as error:
            raise FailedPrecondition(f"{file}: {error.strerror}") from None
        self._size = os.fstat(self._raw.fileno()).st_size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()

    def recover(self) -> Iterator[tuple[int, str, bytes]]:
        """Yields line number, `custom_id` and its key of each result in the file, and drops a last line that was cut off.

        A process that was killed may leave such a line. Raises InvalidRequest for any other line that is no result; then the
        file is as it was.
        """
        for number, text in json_lines(self.file):
            if not text.endswith(b"\n") and (text.startswith(_BEGINS) or _BEGINS.startswith(text)):
                self._truncate(self._size - len(text))
                return
            try:
                line = json.loads(text)
                custom_id = line["custom_id"] if text.endswith(b"\n") and {"response", "error"} <= line.keys() else None
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                custom_id = None
            if not isinstance(custom_id, str):
                shown = text[:80].strip().decode("utf-8", "replace")
                raise InvalidRequest(
                    f"{self.file}: line {number}", shown, "a result of a batch; the file was not changed"
                )
            yield number, custom_id, key_of(custom_id)

    def clear(self) -> None:
        """Removes all results."""
        self._truncate(0)

    def append(self, result: dict[str, Any]) -> None:
        """Writes one line, to the operating system: it is there even if this process is killed at once.

        Raises FailedPrecondition where the disk is full, say; then no part of the line remains.
        """
        line = memoryview(json.dumps(result).encode() + b"\n")
        before, self._size = self._size, self._size + len(line)
        try:
            while line:
                line = line[self._raw.write(line) :]
        except OSError as error:
            self._truncate(before)
            raise FailedPrecondition(f"{self.file}: {error.strerror}") from None

    def _truncate(self, size: int) -> None:
        os.ftruncate(self._raw.fileno(), size)
        self._size = size
