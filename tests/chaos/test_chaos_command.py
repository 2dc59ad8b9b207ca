"""`moiety chaos` against a real system: every family of faults, and that a fault which is not survived is reported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from moiety.tools.chaos.chaos import ChaosRun, chaos_folder, run_local
from moiety.tools.chaos.kinds import KINDS
from moiety.tools.chaos.report import rows_of

SLACK = "10"  # other tests and a busy machine may run beside it
STARTED_S = 60.0


def chaos(*options: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Runs the command with its own folder for temporary files, where it must leave nothing."""
    scratch = tmp_path / "s"
    scratch.mkdir()
    command = [sys.executable, "-m", "moiety.cli.main", "chaos", "--slack", SLACK, *options]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "TMPDIR": str(scratch)}, check=False
    )
    assert not left_in(scratch)
    print(done.stdout)
    return done


def left_in(folder: Path) -> list[str]:
    """Returns what Moiety left in the folder for temporary files; torch leaves a cache there, too."""
    return [name for name in os.listdir(folder) if name.startswith("moiety")]


async def test_a_killed_replica_in_a_short_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One trial on the smallest system that survives it: every stream is identical, and no file is left behind."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run = ChaosRun(seed=3, faults=1, minutes=None, only=("expert-kill",), slack=float(SLACK), groups=1, routers=1)
    with chaos_folder(run) as (disk, model):
        outcome = await run_local(run, disk, model, print)
    (row,) = rows_of(outcome, run.slack)
    assert not row.broken
    assert row.requests == row.identical > 0
    assert outcome.passed
    assert not left_in(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", sorted({kind.family for kind in KINDS}))
def test_every_kind_of_a_family(family: str, tmp_path: Path) -> None:
    """Each kind of the family once: no request fails, no token changes, no stream waits too long, nothing is left.

    Minutes: a fault lasts up to 20 s, and a system is started for each family.
    """
    kinds = [kind.name for kind in KINDS if kind.family == family]
    report = tmp_path / "chaos.json"
    options = ("--only", family, "--faults", str(len(kinds)), "--seed", "3", "--json", str(report))
    done = chaos(*options, tmp_path=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    for kind in kinds:
        assert kind in done.stdout, "it was tried, or skipped by name"
    assert f"seed 3; rerun: moiety chaos --seed 3 --faults {len(kinds)} --only {family}" in done.stdout
    broken = {kind.name for kind in KINDS if kind.may_break}  # all their streams end
    for row in json.loads(report.read_text())["rows"]:
        assert row["identical"] > 0 or row["fault"] in broken


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_faults_on_ray(tmp_path: Path) -> None:
    """A killed and a stopped expert replica and router, on Ray: the same promises, and Serve replaces what is killed.

    Minutes: it starts a Ray of its own. Where the folder for temporary files has too long a path, it says so.
    """
    options = ("--on", "ray", "--only", "expert,router", "--faults", "4")
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="c") as short:
        done = chaos(*options, tmp_path=Path(short))
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    done = chaos(*options, tmp_path=tmp_path)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("set TMPDIR to a shorter one")


@pytest.mark.slow
def test_an_interrupted_run_ends_what_it_started(tmp_path: Path) -> None:
    """Ctrl-C during a trial: exit status 130, and no process and no file of it is left. It waits for a system to start."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    log = tmp_path / "log"
    command = [sys.executable, "-m", "moiety.cli.main", "chaos", "--only", "expert-stop", "--faults", "9"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env={**os.environ, "TMPDIR": str(scratch)}, stdout=output, stderr=output)
    until = time.monotonic() + STARTED_S
    while "quiet:" not in log.read_text():
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 128 + signal.SIGINT
    assert not left_in(scratch)
    marker = str(scratch).encode()
    left = [pid for pid in Path("/proc").iterdir() if pid.name.isdigit() and marker in _environment(pid)]
    assert not left


def _environment(process: Path) -> bytes:
    try:
        return (process / "environ").read_bytes()
    except OSError:
        return b""
