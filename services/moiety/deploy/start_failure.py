"""Why a replica did not start: how the replica reports it, and how the process that waits finds it in Serve's status.

Serve keeps one text per deployment, which `serve status` shows too: the traceback of the latest failed start. A replica
ends that text with a sentence of its own, so that nobody has to look for the replica's log.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from moiety.errors import MoietyError, Unavailable

TORCH_OUT_OF_MEMORY = "OutOfMemoryError"  # of a GPU; importing torch for its name would take seconds
_MARK = "Error:\n"  # Serve's texts about failed starts have it, before the traceback
_log = logging.getLogger(__name__)


class StartFailed(Exception):
    """A replica could not start. Another start may succeed."""


class CannotStart(StartFailed):
    """A replica could not start, and no other start will succeed until someone changes something."""


_SENTENCE = re.compile(rf"\b(?P<kind>{StartFailed.__name__}|{CannotStart.__name__}): (?P<reason>.+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class StartFailure:
    """The latest failed start of a deployment's replicas. `final`: the next ones will fail too."""

    reason: str
    final: bool


@contextmanager
def start_explained() -> Iterator[None]:
    """Raises StartFailed or CannotStart for whatever the block raises: one line with the reason and the process's log.

    What is missing for now may be there at the next start, and so may memory and files: an earlier replica may still hold
    them. Everything else is a wrong setting, a wrong checkpoint or a bug, which the next start meets again.
    """
    try:
        yield
    except Exception as error:
        _log.exception("this replica cannot start")
        heals = isinstance(error, Unavailable | OSError | MemoryError) or type(error).__name__ == TORCH_OUT_OF_MEMORY
        reason = str(error) if isinstance(error, MoietyError) else f"{type(error).__name__}: {error}"
        line = " ".join(reason.split()) + (f" (log: {log})" if (log := _own_log()) else "")
        raise (StartFailed if heals else CannotStart)(line) from None  # Serve's text has room for the sentence alone


def failure_in(message: str) -> StartFailure | None:
    """Returns the failed start that Serve's `message` about a deployment tells of; None if it tells of none.

    A replica that failed before it ran any of Moiety's code, such as one that cannot import it, gives the last line of its
    traceback.
    """
    _, found, text = message.partition(_MARK)
    lines = text.strip().splitlines()
    if not (found and lines):
        return None
    if sentence := _SENTENCE.search(text):
        return StartFailure(" ".join(sentence["reason"].split()), sentence["kind"] == CannotStart.__name__)
    return StartFailure(lines[-1].strip(), False)


def _own_log() -> str:
    """Returns the file that this process's stderr goes to: Ray gives every worker one. Empty if it is no file."""
    try:
        path = os.readlink("/proc/self/fd/2")
    except OSError:
        return ""
    return path if os.path.isfile(path) else ""
