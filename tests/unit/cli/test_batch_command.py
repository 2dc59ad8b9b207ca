"""`moiety batch` against a small server of OpenAI's API on loopback."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from support.openai_server import Fault, OpenAiTestServer, openai_server


@pytest.fixture(autouse=True)
def in_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs each test in a folder of its own."""
    monkeypatch.chdir(tmp_path)


def write_input(numbers: Iterable[int], **body: Any) -> None:
    """Writes in.jsonl, with one request for each of `numbers`."""
    lines = (
        {
            "custom_id": f"r{number}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": "first", "prompt": str(number), "max_tokens": 2} | body,
        }
        for number in numbers
    )
    Path("in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def results(name: str = "out.jsonl") -> dict[str, dict[str, Any]]:
    """Returns the results in a file by their ids, of which there is one each."""
    lines = [json.loads(line) for line in Path(name).read_text().splitlines()]
    assert max(Counter(line["custom_id"] for line in lines).values(), default=1) == 1
    assert all(list(line) == ["id", "custom_id", "response", "error"] for line in lines)
    return {line["custom_id"]: line for line in lines}


def words(server: OpenAiTestServer, *more: str) -> list[str]:
    """Returns the words of the command."""
    return ["batch", "in.jsonl", "out.jsonl", "--url", server.url, *more]


def test_answers_and_errors(moiety: Callable) -> None:
    """Each request has its answer in OUTPUT or its error in the other file, in OpenAI's form; more than N never run at once."""
    write_input(range(30))
    with openai_server() as server:
        server.first_s = 0.02
        server.fault = lambda body, number: Fault(400, "too long") if body["prompt"] in ("3", "7") else None
        outcome = moiety(*words(server, "--concurrency", "4"))
    assert (outcome.status, server.peak) == (1, 4)
    assert outcome.out.splitlines() == [
        "28 done: out.jsonl",
        "2 failed: out.errors.jsonl; --retry-failed sends them again",
    ]
    done, failed = results(), results("out.errors.jsonl")
    assert sorted(failed) == ["r3", "r7"]
    assert sorted([*done, *failed]) == sorted(f"r{number}" for number in range(30))
    answer = done["r5"]
    assert answer["id"].startswith("batch_req_")
    assert (answer["error"], answer["response"]["status_code"]) == (None, 200)
    assert answer["response"]["request_id"].startswith("request-")
    assert answer["response"]["body"]["id"] == "cmpl-5"
    refused = failed["r3"]
    assert (refused["error"], refused["response"]["status_code"]) == (None, 400)
    assert refused["response"]["body"]["error"]["message"] == "too long"


def test_a_second_run_goes_on(moiety: Callable) -> None:
    """A second run sends nothing that has a result; --retry-failed sends what failed, and its errors go."""
    write_input(range(10))
    with openai_server() as server:
        server.fault = lambda body, number: Fault(400) if body["prompt"] == "3" else None
        assert moiety(*words(server)).status == 1
        assert moiety(*words(server)).status == 1
        assert len(server.bodies) == 10
        server.fault = lambda body, number: None
        outcome = moiety(*words(server, "--retry-failed"))
        assert (outcome.status, outcome.out) == (0, "10 done: out.jsonl\n")
        assert [body["prompt"] for body in server.bodies[10:]] == ["3"]
    assert len(results()) == 10
    assert results("out.errors.jsonl") == {}


def test_a_run_that_was_killed_goes_on(moiety: Callable, moiety_process: Callable) -> None:
    """After kill -9 in the middle, the same command finishes: one result per request, and what had one is not sent again."""
    write_input(range(200))
    with openai_server() as server:
        server.first_s = 0.05
        process = moiety_process(*words(server, "--concurrency", "4"))
        deadline = time.monotonic() + 60
        while not Path("out.jsonl").exists() or Path("out.jsonl").read_text().count("\n") < 20:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        file = Path("out.jsonl")
        finished = results()
        assert 20 <= len(finished) < 200
        with file.open("ab") as torn:
            torn.write(b'{"id": "batch_req_12", "custom_id": "r1')
        server.bodies.clear()
        server.first_s = 0.0
        outcome = moiety(*words(server))
        assert (outcome.status, outcome.out) == (0, "200 done: out.jsonl\n")
        assert f"resume: {len(finished)} done and 0 failed earlier" in outcome.err
        assert len(server.bodies) == 200 - len(finished)
    everything = results()
    assert len(everything) == 200
    assert {name: everything[name] for name in finished} == finished


def test_ctrl_c_keeps_what_is_done(moiety_process: Callable) -> None:
    """SIGINT ends a run at once with exit status 130, and says how far it is; what has been answered is in the file."""
    write_input(range(500))
    with openai_server() as server:
        server.first_s = 0.05
        process = moiety_process(*words(server, "--concurrency", "2"))
        for line in process.stderr:
            if "send: 500 of 500" in line:
                break
        deadline = time.monotonic() + 60
        while Path("out.jsonl").read_text().count("\n") < 5:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        server.first_s = 60.0
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert f"{len(results())} done, 0 failed of 500; " in err
    assert "the same command goes on from here" in err


def test_a_busy_server_is_asked_again(moiety: Callable) -> None:
    """Refusals with 429 and 503 are no failures: each request is sent again, not before the delay that the server names."""
    write_input(range(12))
    refused: dict[str, float] = {}
    waits: list[float] = []

    def fault(body: dict[str, Any], number: int) -> Fault | None:
        prompt, now = body["prompt"], time.monotonic()
        if prompt in refused:
            waits.append(now - refused[prompt])
            return None
        refused[prompt] = now
        return Fault(429 if int(prompt) % 2 else 503, "full", {"Retry-After": "0.3"})

    with openai_server() as server:
        server.fault = fault
        outcome = moiety(*words(server))
    assert (outcome.status, len(results())) == (0, 12)
    assert len(waits) == 12
    assert min(waits) >= 0.3


def test_patience_and_retries_end(moiety: Callable) -> None:
    """A server that stays busy, and one that fails again and again, make a request a failure with its reason."""
    write_input(range(3))
    statuses = {"0": 429, "1": 500}
    with openai_server() as server:
        server.fault = lambda body, number: (
            Fault(statuses[body["prompt"]], "why") if body["prompt"] in statuses else None
        )
        server.first_s = 30.0
        outcome = moiety(*words(server, "--patience", "0", "--retries", "1", "--timeout", "0.5"))
        assert outcome.status == 1
        sent = Counter(body["prompt"] for body in server.bodies)
    assert sent == {"0": 1, "1": 2, "2": 1}
    failed = results("out.errors.jsonl")
    assert [failed[f"r{number}"]["response"]["status_code"] for number in (0, 1)] == [429, 500]
    assert (failed["r2"]["response"], failed["r2"]["error"]["code"]) == (None, "timeout")


def test_a_server_that_restarts(moiety_process: Callable) -> None:
    """While the server is away nothing fails: the run waits, and goes on when it is back."""
    write_input(range(20))
    with openai_server() as first:
        first.first_s = 0.2
        process = moiety_process(*words(first, "--concurrency", "2"))
        deadline = time.monotonic() + 60
        while len(first.bodies) < 4:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    with openai_server(int(first.url.rpartition(":")[2])):
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "20 done: out.jsonl\n"), err
    assert len(results()) == 20


def test_a_server_that_stays_away_ends_the_run(moiety: Callable) -> None:
    """Where the server does not come back, the run ends with an error that names it, and nothing counts as failed."""
    write_input(range(3))
    with openai_server() as gone:
        pass
    outcome = moiety(*words(gone))
    assert outcome.status == 1
    assert f"error: no connection: {gone.url}: " in outcome.err
    assert results() == results("out.errors.jsonl") == {}


def test_a_wrong_key_ends_the_run(moiety: Callable) -> None:
    """A key that the server refuses ends the run at once: it would fail every request."""
    write_input(range(3))
    with openai_server() as server:
        server.api_key = "secret"
        outcome = moiety(*words(server))
        assert outcome.status == 1
        assert "HTTP 401" in outcome.err
        assert moiety(*words(server, "--api-key", "secret")).status == 0


def test_what_is_refused_before_anything_is_sent(moiety: Callable) -> None:
    """A wrong line, one file twice, and results of another input each give one clear error, and nothing is sent."""
    with openai_server() as server:
        write_input([1, 2, 1])
        outcome = moiety(*words(server))
        assert (outcome.status, len(server.bodies)) == (1, 0)
        assert "in.jsonl: line 3: custom_id = 'r1': must be unique, but line 1 has it too" in outcome.err
        write_input([1, 2])
        outcome = moiety(*words(server, "--errors", f".{os.sep}out.jsonl"))
        assert "three different files" in outcome.err
        assert moiety(*words(server)).status == 0
        write_input([2, 3])
        outcome = moiety(*words(server))
        assert (outcome.status, len(server.bodies)) == (1, 2)
        assert "out.jsonl: line 1: custom_id = 'r1': must be that of a request of in.jsonl" in outcome.err
