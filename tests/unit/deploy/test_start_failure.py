"""How a replica's reason for not starting gets into Serve's text about its deployment, and out of it again."""

from __future__ import annotations

import traceback

import pytest

from moiety.deploy.start_failure import StartFailed, StartFailure, failure_in, start_explained
from moiety.errors import CheckpointError, ConfigError, RegistryUnreachable


def _serve_says(error: Exception) -> str:
    """Returns what Serve says about a deployment whose replica raised `error`, as Ray 2.60 builds it."""
    with pytest.raises(StartFailed) as raised, start_explained():
        raise error
    trace = "".join(traceback.format_exception(raised.value))
    inner = f"ray::ServeReplica:moiety:router.initialize() (pid=7, ip=127.0.0.1)\nRuntimeError: {trace}"
    return f"A replica failed to start with exception. Retrying 2 more time(s). Error:\n{inner}"


@pytest.mark.parametrize(
    ("error", "reason", "final"),
    [
        (
            ConfigError("kv_memory", 1024, "must be at least 4096"),
            "setting kv_memory = 1024: must be at least 4096",
            True,
        ),
        (CheckpointError("no usable\n  tokenizer"), "no usable tokenizer", True),
        (TypeError("3 arguments"), "TypeError: 3 arguments", True),
        (
            RegistryUnreachable("registry redis://h:1/0 does not answer"),
            "registry redis://h:1/0 does not answer",
            False,
        ),
        (OSError("Too many open files"), "OSError: Too many open files", False),
    ],
)
def test_the_reason_is_found_in_the_traceback(error: Exception, reason: str, final: bool) -> None:
    """The reason is one line with the error's own sentence; only what may be there at the next start is not final."""
    found = failure_in(_serve_says(error))
    assert found is not None
    assert (found.reason.partition(" (log: ")[0], found.final) == (reason, final)


def test_texts_without_a_reason_of_ours() -> None:
    """A replica that failed before Moiety's code ran gives the last line of its traceback; other texts tell of no failure."""
    trace = "Traceback (most recent call last):\n  File x\nModuleNotFoundError: No module named 'moiety'\n"
    assert failure_in(f"A replica failed to start. Error:\n{trace}") == StartFailure(
        "ModuleNotFoundError: No module named 'moiety'", final=False
    )
    assert failure_in("Upscaling from 0 to 1 replicas.") is None
    assert failure_in("") is None
