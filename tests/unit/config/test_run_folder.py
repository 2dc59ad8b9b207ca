"""The folder of a run, and the cache: what they keep is bounded."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from moiety.config.cache_folder import KEPT as DERIVED_KEPT
from moiety.config.cache_folder import prune_derived, read_derived, write_derived
from moiety.config.run_folder import KEPT, RunFolder, kept_folder, run_folder, scratch_folder


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder of this test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_failed_run_keeps_its_folder_and_names_it() -> None:
    """A run that ends well, by a signal, or without a log, leaves nothing; another says where its folder is."""
    said: list[str] = []
    with run_folder("serve", said.append) as ended:
        assert ended.stat().st_mode & 0o777 == 0o700
    with pytest.raises(KeyboardInterrupt), run_folder("serve", said.append) as interrupted:
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="reason"), run_folder("serve", said.append) as empty:
        raise ValueError("reason")
    with pytest.raises(ValueError, match="reason"), run_folder("serve", said.append) as failed:
        raise ValueError(f"reason {(failed / 'log').write_text('why')}")
    assert [path.is_dir() for path in (ended, interrupted, empty, failed)] == [False, False, False, True]
    assert kept_folder("serve") == failed
    assert kept_folder("cluster") is None
    assert said == [f"the logs of this run stay in {failed}: the {KEPT} newest are kept, for 7 days"]


def test_what_failed_runs_leave_is_bounded() -> None:
    """A new run removes all but the newest folders that earlier ones left, and those that are old; not those in use."""
    living = RunFolder("serve")
    left = [RunFolder("cluster") for _ in range(KEPT + 2)]
    for age, folder in enumerate((living, *left)):
        os.utime(folder.path, (age, age) if folder is living else (2e9 + age, 2e9 + age))
    for folder in left:
        folder.end(keep=True)
    RunFolder("serve").end()
    assert living.path.is_dir()
    assert [folder.path.is_dir() for folder in left] == [False] * 2 + [True] * KEPT
    os.utime(left[-1].path, (1, 1))
    RunFolder("serve").end()
    assert [folder.path.is_dir() for folder in left[-KEPT:]] == [True] * (KEPT - 1) + [False]
    living.end()
    assert not living.path.exists()


def test_scratch_folders_of_killed_runs_are_removed() -> None:
    """A scratch folder lasts as long as its context or, if the process is killed, until the next run."""
    with scratch_folder() as used:
        killed = RunFolder("scratch")
        killed.end(keep=True)  # as after kill -9: nobody holds it
        for folder in (used, killed.path):
            os.utime(folder, (1, 1))
        RunFolder("serve").end()
        assert (used.is_dir(), killed.path.exists()) == (True, False)
    assert not used.exists()


def test_a_name_that_another_has_taken_stops_no_run(temporary: Path) -> None:
    """Where the user's folder cannot be trusted, a run gets a folder of its own elsewhere."""
    (temporary / f"moiety-{os.getuid()}").mkdir(mode=0o777)
    (temporary / f"moiety-{os.getuid()}").chmod(0o777)
    with run_folder("serve", print) as folder:
        assert folder.parent == temporary
    assert not folder.exists()


def test_the_cache_keeps_what_was_used_last(tmp_path: Path) -> None:
    """Of derived files of one kind, the last used stay; a folder that becomes empty goes with its file."""
    files = [tmp_path / f"model-{number}" / "layout.json" for number in range(DERIVED_KEPT + 2)]
    for age, file in enumerate(files):
        write_derived(file, "{}")
        os.utime(file, (age, age))
    assert read_derived(files[0]) == "{}"
    prune_derived(tmp_path.glob("*/layout.json"))
    assert [file.parent.exists() for file in files] == [True, False, False] + [True] * (DERIVED_KEPT - 1)
