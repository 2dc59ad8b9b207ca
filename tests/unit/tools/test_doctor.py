"""The doctor's verdicts, and facts about the machine."""

from __future__ import annotations

import json
import socket
import sys
import tempfile
from pathlib import Path

import pytest

from moiety.cli.main import run
from moiety.tools.doctor import Check, Finding, doctor_lines, examine
from moiety.tools.machine import core_quota, cpu_seconds
from moiety_kernels.threads import usable_cores


def test_doctor_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Every check has a verdict, every check that is not ok has advice, and the JSON file agrees with the screen."""
    file = tmp_path / "doctor.json"
    status = run(["doctor", "--json", str(file)])
    checks = json.loads(file.read_text())
    shown = capsys.readouterr().out
    assert status == (1 if any(check["verdict"] == "fail" for check in checks) else 0)
    assert {"python", "torch", "cores", "C++ kernels", "OMP_WAIT_POLICY", "redis server"} <= {
        c["check"] for c in checks
    }
    for check in checks:
        assert check["verdict"] in ("ok", "warn", "fail")
        assert bool(check["advice"]) == (check["verdict"] != "ok")
        assert check["value"] in shown


def test_settings_that_slow_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that slows services down gives a warning that says what to do."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.setenv("MOIETY_CPU_KERNELS", "off")
    checks = {check.check: check for check in examine()}
    assert checks["OMP_WAIT_POLICY"].verdict is Finding.WARN
    assert "passive" in checks["OMP_WAIT_POLICY"].advice
    assert checks["C++ kernels"].verdict is Finding.WARN


def test_port_in_use() -> None:
    """A gateway port that is in use gives a warning, which names the option that changes it."""
    with socket.socket() as grpc, socket.socket() as http:
        for taken, port in ((grpc, 50051), (http, 50080)):
            try:
                taken.bind(("127.0.0.1", port))
                taken.listen()
            except OSError:
                pass  # another process uses the port, which serves the test as well
        checks = {check.check: check for check in examine()}
    for port, option in ((50051, "--grpc-port"), (50080, "--http-port")):
        check = checks[f"port {port}"]
        assert (check.verdict, option in check.advice) == (Finding.WARN, True)


def test_what_first_contact_runs_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Ray of somebody's, a folder too long for Ray's sockets, and a folder that hides the package are named with advice."""
    (tmp_path / "moiety").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [])  # as where the package was installed in editable mode
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    checks = {check.check: check for check in examine()}
    assert "--ray-address auto" in checks["RAY_ADDRESS"].value
    assert (checks["Ray's folder"].verdict, checks["package"].verdict) == (Finding.FAIL, Finding.WARN)
    assert str(tmp_path / "moiety") in checks["package"].value


def test_doctor_lines_count() -> None:
    """Advice is on the line below its check, and the last line counts verdicts."""
    lines = list(doctor_lines([Check("a", "1"), Check("bb", "2", Finding.FAIL, "fix it")]))
    assert lines == ["ok    a   1", "fail  bb  2", "          → fix it", "1 ok, 0 warn, 1 fail"]


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2.0),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({}, None),
    ],
)
def test_core_quota(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    """Both versions of control groups are read; without a limit or a file there is no quota."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    assert core_quota(tmp_path) == quota


def test_process_time() -> None:
    """The processor time of a process that does not exist is None."""
    assert usable_cores() >= 1
    assert (cpu_seconds(1 << 30)) is None
