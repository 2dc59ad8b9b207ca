"""The commands find the system that runs on this machine: requests, status, logs, rebalance and stop need no address."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moiety.config.running_systems import recorded, running_systems
from support.serving import Served

Update = Callable[..., None]

# Records a system and ends as argv[1] says: at the first SIGTERM, at the second, or never.
ENDS = """
import signal, sys
from moiety.config.running_systems import recorded
signals = []
signal.signal(signal.SIGTERM, lambda *_: signals.append(1))
with recorded("chat", "tiny", print):
    print("recorded", flush=True)
    while len(signals) < {"first": 1, "second": 2, "never": 99}[sys.argv[1]]:
        signal.pause()
"""


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test sees only what it records itself."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


@pytest.fixture
def here(served: Served) -> Iterator[Update]:
    """Records the session's running system as one of this machine."""
    cluster = served.cluster
    with recorded("local", "qwen3_moe", print) as update:
        update(
            ready=True,
            grpc=(cluster.address,),
            http=(cluster.http_address,),
            registry=cluster.registry_url,
            system=str(cluster.system),
        )
        yield update


@pytest.fixture
def ending() -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Starts processes that are recorded as the application `chat`."""
    started: list[subprocess.Popen[str]] = []

    def start(when: str) -> subprocess.Popen[str]:
        process = subprocess.Popen([sys.executable, "-c", ENDS, when], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "recorded\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_requests_need_no_address(here: Update, served: Served, moiety: Callable) -> None:
    """`generate` sends to the system on this machine; --json gives text, token ids, counts and times of every choice."""
    words = ["generate", "Each expert", "--max-tokens", "4", "--ignore-eos"]
    text = moiety(*words).out
    outcome = moiety(*words, "--n", "2", "--json")
    whole = json.loads(outcome.out)
    assert whole["choices"][0]["text"] + "\n" == text
    assert [len(choice["token_ids"]) for choice in whole["choices"]] == [4, 4]
    assert (whole["completion_tokens"], whole["choices"][1]["finish_reason"]) == (8, "length")
    assert 0 < whole["first_token_s"] <= whole["all_s"]
    assert "8 new tokens" in outcome.err


def test_a_batch_needs_no_url(here: Update, moiety: Callable, tmp_path: Path) -> None:
    """`batch` sends to the HTTP API of the system on this machine, and says so where that is off."""
    body = {"model": "", "prompt": "Each expert", "max_tokens": 2}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    (tmp_path / "in.jsonl").write_text(json.dumps(line))
    words = ["batch", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "--patience", "0", "--retries", "0"]
    assert moiety(*words).status == 0
    here(http=())
    assert "has no HTTP API" in moiety(*words).err


def test_an_address_wins(here: Update, moiety: Callable) -> None:
    """An explicit --address is used whatever runs here, and its error has no advice about this machine."""
    outcome = moiety("generate", "x", "--address", "127.0.0.1:1")
    assert outcome.status == 1
    assert "127.0.0.1:1" in outcome.err
    assert "runs on this machine" not in outcome.err


def test_status_of_this_machine_and_of_a_registry(here: Update, served: Served, moiety: Callable) -> None:
    """`status` shows all replicas, also from the registry's address alone; JSON too."""
    outcome = moiety("status")
    assert outcome.status == 0
    for replica in (child.replica for child in served.cluster.children):
        assert replica.address in outcome.out
    assert f"pid {os.getpid()}" in outcome.out
    remote = moiety("status", "--registry", served.redis.url, "--app", "local", "--json")
    assert set(json.loads(remote.out)["deployments"]) >= {"gateway", "router", "experts-0", "experts-1"}
    read = json.loads(moiety("status", "--json").out)
    assert read["system"] == str(served.cluster.system)
    (router,) = read["deployments"]["router"]
    assert router["load"]["busy"] >= 0


def test_status_is_shown_again_until_it_ends(here: Update, moiety_process: Callable) -> None:
    """`--watch` prints one state after another; with --json, one line each."""
    process = moiety_process("status", "--watch", "--every", "0.2", "--json")
    first, second = (json.loads(process.stdout.readline()) for _ in range(2))
    assert first["system"] == second["system"]
    assert first["time"] < second["time"]


def test_rebalance_finds_it(here: Update, moiety: Callable) -> None:
    """`rebalance` reads the ledger of the system here, and says that there is no load to plan for."""
    outcome = moiety("rebalance", "--dry-run", "--watch", "2")
    assert outcome.err == "error: no expert had a row in 2 s: there is no load to plan for\n"


def test_a_system_that_starts_is_not_ready(here: Update, moiety: Callable) -> None:
    """A request before the system is ready is refused with that reason; `status` shows that it starts."""
    here(ready=False, grpc=(), http=(), registry="", system="")
    assert "is not ready yet: `moiety status --watch` shows" in moiety("generate", "x").err
    outcome = moiety("status")
    assert (outcome.status, outcome.out.splitlines()[0]) == (0, "local: starting, model qwen3_moe")


@pytest.mark.parametrize(
    "words", [["generate", "x"], ["chat"], ["status"], ["rebalance"], ["logs"], ["stop"]], ids=" ".join
)
def test_several_are_listed(words: list[str], ending: Callable, moiety: Callable, moiety_process: Callable) -> None:
    """Where two systems run, each command lists both and says how to choose."""
    ending("never")
    with recorded("second", "tiny", print):
        outcome = moiety(*words)
    assert outcome.status == 1
    assert "error: 2 systems run on this machine: chat (model tiny, starting, pid " in outcome.err
    assert "; second (model tiny" in outcome.err
    assert "choose one with --app" in outcome.err


@pytest.mark.parametrize(
    "words", [["stop"], ["logs"], ["generate", "x"], ["generate", "x", "--app", "y"]], ids=" ".join
)
def test_none_runs(words: list[str], moiety: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where none runs, the error says so and what to do, in one line."""
    monkeypatch.setattr("moiety.cli.generate.DEFAULT_ADDRESS", "127.0.0.1:1")
    outcome = moiety(*words)
    assert outcome.status == 1
    assert "no system that `moiety serve` started runs on this machine" in outcome.err
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize("words", [["status"], ["stop"], ["logs"], ["generate", "x"]], ids=" ".join)
@pytest.mark.parametrize("kind", ["open", "link"])
def test_a_folder_of_records_that_cannot_be_trusted_is_named(
    kind: str, words: list[str], moiety: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A system may run and not be seen: one line names the folder that others may change, and what to do."""
    monkeypatch.setattr("moiety.cli.generate.DEFAULT_ADDRESS", "127.0.0.1:1")
    folder = tmp_path / "moiety"
    if kind == "open":
        folder.mkdir()
        folder.chmod(0o755)
    else:
        folder.symlink_to(tmp_path)
    outcome = moiety(*words)
    assert outcome.status == 1
    assert f"can be seen on this machine ({'folder ' if kind == 'open' else ''}{folder}" in outcome.err
    assert "set XDG_RUNTIME_DIR or TMPDIR to another" in outcome.err
    assert outcome.err.count("\n") == 1


def test_stop_waits_until_it_is_gone(ending: Callable, moiety: Callable) -> None:
    """`stop` ends the process by SIGTERM and returns once it is gone; a second one finds nothing to stop."""
    process = ending("first")
    outcome = moiety("stop", "--app", "chat")
    assert outcome.status == 0
    assert process.poll() is not None or process.wait(10) == 0
    assert running_systems() == ()
    assert "chat has ended" in outcome.err
    assert moiety("stop").status == 1


def test_stop_now_and_a_limit(ending: Callable, moiety: Callable) -> None:
    """--timeout ends the waiting with status 1 and the way out; --now sends the second signal, which ends a system at once."""
    ending("second")
    outcome = moiety("stop", "--timeout", "0.3")
    assert outcome.status == 1
    assert "has not ended after 0.3 s, and goes on ending: --now ends it at once" in outcome.err
    assert moiety("stop", "--now").status == 0


def test_logs_of_the_system_here(here: Update, moiety: Callable, tmp_path: Path) -> None:
    """`logs` prints what the replicas of the recorded system wrote, or says why it prints nothing."""
    assert "keeps no logs in a folder of this machine" in moiety("logs").err
    here(logs=str(tmp_path / "gone"))
    assert f"its folder of logs is gone: {tmp_path / 'gone'}" in moiety("logs").err
    here(ready=False)
    starts = moiety("logs")
    assert (starts.status, starts.out) == (0, "")
    assert "no log has a line yet" in starts.err
    here(ready=True)
    (tmp_path / "serve").mkdir()
    (tmp_path / "serve" / "replica_local_router_2obnzzzv.log").write_text("why\n")
    here(logs=str(tmp_path))
    assert moiety("logs", "router").out == "router 2obnzzzv: why\n"
    assert "there are router" in moiety("logs", "gateway").err
