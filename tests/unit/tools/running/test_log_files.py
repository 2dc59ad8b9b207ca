"""The logs of replicas, in files as Ray names them: whose they are, their last lines, and lines that are added."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from moiety.errors import NotFound
from moiety.tools.running.logs import LogReader

ID = "76a0caef3bdfbcfcc4f68d9daa9ecae765fbe51b63c05e996a668ea5"


def worker(folder: Path, pid: int, actor: str, text: str) -> Path:
    """Writes what a process of Ray's prints on stderr."""
    file = folder / f"worker-{ID}-01000000-{pid}.err"
    file.write_text(f":job_id:01000000\n:actor_name:{actor}\n{text}")
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Logs of two applications."""
    (tmp_path / "serve").mkdir()
    (tmp_path / "serve" / "replica_my_app_experts-1_8vs42tye.log").write_text("one\ntwo\nthree\n")
    (tmp_path / "serve" / "replica_my_app_router_2obnzzzv.log").write_text("routes\n")
    (tmp_path / "serve" / "replica_other_router_xxxxxxxx.log").write_text("another application\n")
    (tmp_path / "serve" / "controller_77.log").write_text("starts replicas\n")
    worker(tmp_path, 41, "ServeReplica:my_app:experts-1", "Traceback …\nValueError: why\n")
    worker(tmp_path, 42, "ServeReplica:my_app_2:experts-1", "another application\n")
    worker(tmp_path, 43, "ServeController", "another process\n")
    return tmp_path


def test_the_last_lines_of_each_replica(folder: Path) -> None:
    """Each line begins with deployment and replica or process; other applications and Ray's marks are left out."""
    with closing(LogReader(folder, "my_app")) as reader:
        assert list(reader.last(2)) == [
            "controller pid 77: starts replicas",
            "experts-1 8vs42tye: two",
            "experts-1 8vs42tye: three",
            "experts-1 pid 41: Traceback …",
            "experts-1 pid 41: ValueError: why",
            "router 2obnzzzv: routes",
        ]


def test_a_deployment_or_a_kind_of_them(folder: Path) -> None:
    """A name chooses one deployment, `experts` all groups; an unknown one is refused with the names that there are."""
    for wanted, prefixes in (("router", {"router"}), ("experts", {"experts-1"}), ("experts-1", {"experts-1"})):
        with closing(LogReader(folder, "my_app", wanted)) as reader:
            assert {line.split()[0] for line in reader.last(20)} == prefixes
    with (
        closing(LogReader(folder, "my_app", "expert-1")) as reader,
        pytest.raises(NotFound, match="'expert-1': there are controller, experts-1, router"),
    ):
        list(reader.last(20))


def test_following_includes_replicas_that_start_later(folder: Path) -> None:
    """New lines come once each, a line only when it is whole, those of new files too; the end comes after the last lines."""
    log = folder / "serve" / "replica_my_app_router_2obnzzzv.log"

    def steps() -> Iterator[bool]:
        with log.open("a") as stream:
            stream.write("more\nhalf of a ")
        yield True
        with log.open("a") as stream:
            stream.write("line\n")
        worker(folder, 44, "ServeReplica:my_app:router", "a second router\n")
        yield True
        log.unlink()
        with (folder / "serve" / "replica_my_app_router_zzzzzzzz.log").open("w") as stream:
            stream.write("at the end\n")
        yield False

    running = steps()
    with closing(LogReader(folder, "my_app", "router")) as reader:
        assert list(reader.last(0)) == []
        assert list(reader.follow(lambda: next(running), poll_s=0.0)) == [
            "router 2obnzzzv: more",
            "router 2obnzzzv: half of a line",
            "router pid 44: a second router",
            "router zzzzzzzz: at the end",
        ]


def test_a_log_that_is_rotated_and_a_last_line_without_an_end(folder: Path) -> None:
    """Lines go on in the file that takes a renamed one's place; a last line that never ended is shown too."""
    log = folder / "serve" / "replica_my_app_router_2obnzzzv.log"
    with closing(LogReader(folder, "my_app", "router")) as reader:
        assert list(reader.last(0)) == []
        with log.open("a") as stream:
            stream.write("before\n")
        log.rename(log.with_suffix(".log.1"))
        log.write_text("after\nkil")
        assert list(reader.added()) == ["router 2obnzzzv: before", "router 2obnzzzv: after"]
        assert list(reader.unfinished()) == ["router 2obnzzzv: kil"]
