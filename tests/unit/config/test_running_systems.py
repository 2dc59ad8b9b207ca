"""The record of a running system: who sees it, how long, and what may not fool a reader."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from moiety.config.own_files import runtime_folder
from moiety.config.running_systems import chosen, is_running, recorded, running_systems
from moiety.errors import FailedPrecondition

# Records a system, says so, and waits until its stdin ends.
RECORDS = """
import sys
from moiety.config.running_systems import recorded
with recorded(sys.argv[1], "tiny", print) as update:
    update(ready=True, grpc=("127.0.0.1:1",), registry="redis://:hidden@h/0")
    print("recorded", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The runtime folder of this test."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "moiety"


@pytest.fixture
def other() -> Iterator[subprocess.Popen[str]]:
    """A process that has recorded the application `chat`."""
    process = subprocess.Popen(
        [sys.executable, "-c", RECORDS, "chat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "recorded\n"
    yield process
    process.kill()
    process.communicate()


def test_a_record_lasts_as_long_as_its_process(other: subprocess.Popen[str], folder: Path) -> None:
    """A system is listed with its last changes while its process lives; a killed one is not, and its file is removed."""
    (system,) = running_systems()
    assert (system.pid, system.app, system.ready, system.grpc) == (other.pid, "chat", True, ("127.0.0.1:1",))
    assert system.registry == "redis://:hidden@h/0"
    assert is_running(system)
    other.kill()
    other.wait()
    assert len(list(folder.iterdir())) == 1
    assert running_systems() == ()
    assert not is_running(system)
    assert list(folder.iterdir()) == []


def test_a_process_with_the_same_id_fools_nobody(other: subprocess.Popen[str], folder: Path) -> None:
    """A file that no process holds is not believed, though a process with its pid lives."""
    (system,) = running_systems()
    other.kill()
    other.wait()
    (file,) = folder.iterdir()
    file.write_text(json.dumps({**json.loads(file.read_text()), "pid": os.getpid()}))
    assert running_systems() == ()
    assert not is_running(system)


def test_only_this_user_may_read_it(folder: Path) -> None:
    """Folder and file are private; a folder that others may change is not believed, and a system there says so."""
    said: list[str] = []
    with recorded("moiety", "tiny", said.append):
        (file,) = folder.iterdir()
        assert (folder.stat().st_mode & 0o777, file.stat().st_mode & 0o777) == (0o700, 0o600)
        folder.chmod(0o777)
        assert running_systems() == ()
        with recorded("second", "tiny", said.append) as update:
            update(ready=True)
    (line,) = said
    assert line.startswith("`moiety status`, `logs` and `stop` will not find this system: folder ")
    assert "mode 0700" in line


def test_a_clean_end_leaves_nothing(folder: Path) -> None:
    """After the context, also by an exception, there is no file."""
    with pytest.raises(KeyboardInterrupt, match="app='moiety'"), recorded("moiety", "tiny", print):
        raise KeyboardInterrupt(running_systems())
    assert list(folder.iterdir()) == []


def test_of_several_systems_one_must_be_named(other: subprocess.Popen[str]) -> None:
    """Application or pid chooses; without them the error lists what runs, as it does for a name that is not there."""
    assert chosen((), "chat") is None
    with ExitStack() as ends:
        ends.enter_context(recorded("code", "tiny", print))
        ends.enter_context(recorded("code", "other", print))
        systems = running_systems()
        assert chosen(systems, "chat") is chosen(systems, str(other.pid)) is systems[0]
        with pytest.raises(FailedPrecondition, match=r"3 systems run on this machine: chat \(model tiny, gRPC 127"):
            chosen(systems, None)
        with pytest.raises(
            FailedPrecondition, match=r"2 systems run on this machine: code \(model tiny, starting, pid"
        ):
            chosen(systems, "code")
        with pytest.raises(
            FailedPrecondition, match="no system of application 'nope' runs on this machine; what runs: c"
        ):
            chosen(systems, "nope")


def test_files_of_elsewhere_are_left_alone(folder: Path) -> None:
    """What is no record, or was written on another host or in another container, is neither listed nor removed."""
    with recorded("moiety", "tiny", print):
        (file,) = runtime_folder().iterdir()
        own = json.loads(file.read_text())
        (folder / "broken.json").write_text("{")
        (folder / "later.json").write_text(json.dumps({**own, "new": 1}))
        file.write_text(json.dumps({**own, "machine": "elsewhere"}))
        assert running_systems() == ()
        assert {each.name for each in folder.iterdir()} == {file.name, "broken.json"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"pid": -1},
        {"pid": "7"},
        {"since": "x"},
        {"app": 7},
        {"grpc": [5]},
        {"ready": True, "grpc": []},
        {"system": "x"},
    ],
)
def test_a_record_with_a_wrong_field_is_not_believed(folder: Path, wrong: dict[str, Any]) -> None:
    """No command acts on a field of the wrong type, above all not on a pid that stands for every process."""
    with recorded("moiety", "tiny", print):
        (file,) = folder.iterdir()
        stated = {**json.loads(file.read_text()), **wrong}
        file.write_text(json.dumps(stated))  # the lock stays
        assert running_systems() == ()


def test_no_file_in_the_folder_stops_a_command(folder: Path) -> None:
    """A pipe, JSON that nests too deep, a file larger than the memory and a folder are passed over at once."""
    folder.mkdir(mode=0o700, exist_ok=True)
    os.mkfifo(folder / "pipe.json")
    (folder / "deep.json").write_text("[" * 100000)
    with (folder / "huge.json").open("wb") as huge:
        huge.truncate(1 << 42)
    (folder / "folder.json").mkdir()
    with recorded("moiety", "tiny", print):
        assert [system.app for system in running_systems()] == ["moiety"]
