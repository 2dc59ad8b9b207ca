"""The top-level command: help, version, errors and exit statuses, without a running system."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moiety import __version__
from moiety.cli.bench import COMMANDS as BENCHMARKS
from moiety.cli.chaos import chaos
from moiety.cli.main import COMMANDS, run
from moiety.cli.options import invocation
from moiety.cli.run import Interrupted, run_async, signals_interrupt
from moiety.errors import CheckpointError

HEAVY = ("torch", "transformers", "ray", "grpc", "numpy", "pydantic")


def test_help_imports_nothing_heavy() -> None:
    """Listing the commands imports none of the heavy libraries that commands need: a person is waiting."""
    script = (
        "import sys; from moiety.cli.main import run; assert run(['--help']) == 0; "
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stderr.strip() == "[]"
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize(
    "words", [*((name,) for name in COMMANDS), *(("bench", name) for name in BENCHMARKS)], ids=" ".join
)
def test_list_agrees_with_commands(words: tuple[str, ...], moiety: Callable) -> None:
    """A command's help begins with its summary in the list of commands, and shows an example."""
    outcome = moiety(*words, "--help")
    assert outcome.status == 0
    help_text = " ".join(outcome.out.partition("\n\n")[2].split())
    assert help_text.startswith((COMMANDS if len(words) == 1 else BENCHMARKS)[words[-1]])
    assert "Example" in help_text


@pytest.mark.parametrize("words", [(), ("bench",)], ids=["moiety", "bench"])
def test_a_group_alone_shows_its_help(words: tuple[str, ...], moiety: Callable) -> None:
    """`moiety` and `moiety bench` without a command print what `--help` does, which is no error."""
    assert moiety(*words) == moiety(*words, "--help")


def test_version(moiety: Callable) -> None:
    """`--version` prints the program's name and its version."""
    assert moiety("--version").out == f"moiety, version {__version__}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["gen", "x"], "No such command 'gen'; did you mean 'generate'?"),
        (["status", "--address", "x"], "No such option '--address'; did you mean '--registry'?"),
        (["generate", "x", "--url", "y"], "No such option '--url'; did you mean '--address'?"),
        (["generate", "x", "--temp", "1"], "No such option '--temp'; did you mean '--temperature' or '--template-"),
        (["serve", "x", "--threads", "8"], "did you mean '--set router.threads=…' or '--set experts.threads=…'?"),
        (["serve", "x", "--router-slot", "8"], "did you mean '--set router.slots=…'?"),
        (["serve", "x", "--hlp"], "No such option '--hlp'; did you mean '--help'?"),
        (["bench", "hop", "--log-level", "info"], "it goes before the command: moiety --log-level …"),
        (["--log-level", "loud", "bench"], "'loud' is not one of 'debug', 'info', 'warning', 'error'"),
        (["parity", "x", "--groups", "0"], "0 is not in the range x>=1"),
        (["parity", "x", "--dtype", "int3"], "'int3' is not one of 'auto', 'float32', 'bfloat16', 'float16'"),
        (["parity", "x", "--json", "no/such/folder/file"], "no/such/folder is not a folder"),
        (["bench", "hop", "--payload", "4,6"], "6: must be integers from 4 to 16384, multiples of 4"),
        (["bench", "serve", "--concurrency", "1,many"], "'1,many': must be integers from 1 to 1024"),
        (["bench", "serve", "--new", "1"], "1 is not in the range"),
        (["generate", "x", "--temperature", "11"], "11.0 is not in the range 0<=x<=10"),
        (["generate", "x", "--top-p", "0"], "0.0 is not in the range 0<x<=1"),
        (["settings", "router.lane", "slts"], "no setting has 'slts' in its name; did you mean 'slots'?"),
        (["generate"], "Missing argument 'PROMPT'"),
    ],
)
def test_wrong_usage(words: list[str], message: str, moiety: Callable) -> None:
    """A wrong argument fails before any work: exit status 2, and the value and its bound on stderr."""
    outcome = moiety(*words)
    assert (outcome.status, outcome.out) == (2, "")
    assert message in " ".join(outcome.err.split())


@pytest.mark.parametrize("words", [["bench", "serve", "--models"], ["bench", "split", "--model"]])
def test_error_is_one_line(words: list[str], moiety: Callable) -> None:
    """A command that cannot do its work prints one line on stderr and exits with status 1."""
    outcome = moiety(*words, "/no/such/checkpoint")
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.err == "error: checkpoint /no/such/checkpoint: no such folder\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_lets_work_clean_up(number: signal.Signals) -> None:
    """A signal cancels the work, waits for its clean-up, and gives an exit status that names the signal."""
    steps = []

    async def work() -> None:
        try:
            os.kill(os.getpid(), number)
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            steps.append("cleaned up")

    with pytest.raises(Interrupted) as interrupted:
        run_async(work())
    assert steps == ["cleaned up"]
    assert interrupted.value.exit_status == 128 + number


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_only_the_first_signal_interrupts(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one is noted, so that an end which waits can hurry; one that comes with the first is the same."""
    with signals_interrupt() as signals:
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert not signals.again()
        monkeypatch.setattr("moiety.cli.run.SAME_S", 0.0)
        os.kill(os.getpid(), number)
        assert signals.again()


@pytest.mark.parametrize("becomes", [None, KeyboardInterrupt], ids=["dropped", "replaced"])
def test_an_interruption_is_not_lost(becomes: type[KeyboardInterrupt] | None) -> None:
    """One that code in between drops is raised again, one that it replaces names the signal and ends clean-up no sooner."""
    steps = []

    def drops_it(ends: contextlib.ExitStack) -> None:
        ends.callback(steps.append, "cleaned up")
        ends.callback(time.sleep, 0.3)
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        if becomes is not None:
            raise becomes
        time.sleep(5)
        steps.append("went on")

    with pytest.raises(Interrupted, match="SIGTERM"), signals_interrupt(), contextlib.ExitStack() as ends:
        drops_it(ends)
    assert steps == ["cleaned up"]


def test_a_signal_is_no_error_of_a_library() -> None:
    """Code that makes an error of whatever a library raises does not catch it."""

    def open_by_a_library() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Exception as error:
            raise CheckpointError("the library cannot read it") from error

    with pytest.raises(Interrupted), signals_interrupt():
        open_by_a_library()


def test_rebalance_reports_a_wrong_address_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    """`rebalance` reports an unreachable registry in one line that names it, without watching for load first."""
    began = time.monotonic()
    assert run(["rebalance", "--registry", "redis://127.0.0.1:1/0", "--watch", "60"]) == 1
    assert time.monotonic() - began < 20
    assert capsys.readouterr().err.startswith("error: registry redis://127.0.0.1:1/0: ")


def test_rebalance_reads_settings_where_serve_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`rebalance` finds the registry in a secret file, and shows its address without the password."""
    (tmp_path / "registry").write_text("redis://:hidden@127.0.0.1:1/3")
    monkeypatch.setenv("MOIETY_SECRETS_DIR", str(tmp_path))
    assert run(["rebalance", "--watch", "60"]) == 1
    assert capsys.readouterr().err.startswith("error: registry redis://127.0.0.1:1/3: ")


def test_the_line_that_repeats_a_run_can_be_run() -> None:
    """It leaves out options without a value, which the command would refuse."""
    line = invocation(chaos.make_context("moiety chaos", ["--faults", "2"]))
    assert line == "moiety chaos --seed 0 --faults 2 --on local --slack 1.0"
    assert invocation(chaos.make_context("moiety chaos", line.split()[2:])) == line
