"""`moiety bench load` against a small server of OpenAI's API on loopback."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from support.openai_server import Fault, openai_server


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_open_loop(moiety: Callable, tmp_path: Path, endpoint: str) -> None:
    """Every request is sent and measured, the report has every measure, and the key is not in the line that repeats it."""
    file = tmp_path / "load.json"
    with openai_server() as server:
        server.api_key, server.first_s, server.between_s = "secret-key", 0.02, 0.005
        words = f"--rate 40 --requests 20 --endpoint {endpoint} --output-tokens 3:5 --goodput ttft:60s".split()
        options = ["--extra", '{"temperature": 0}', "--api-key", "secret-key", "--json", str(file)]
        outcome = moiety("bench", "load", server.url, *words, *options)
    assert outcome.status == 0, outcome.err
    assert len(server.bodies) == 21  # and one to warm up
    assert all(body["temperature"] == 0 and body["model"] == "first" for body in server.bodies)
    report = json.loads(file.read_text())
    assert (report["ok"], report["failed"], report["offered"], len(report["requests"])) == (20, 0, 20, 20)
    assert report["output_tokens"] == sum(body["max_tokens"] for body in server.bodies[1:])
    assert report["spreads"]["ttft"]["p50"] >= 20
    assert report["spreads"]["itl"]["mean"] > 2
    assert report["spreads"]["itl"]["samples"] == report["output_tokens"] - 20
    assert report["goodput"]["fraction"] == 1.0
    for expected in ("20 ok, 0 failed", "TTFT ms", "ITL ms", "TPOT ms", "E2E ms", "goodput:   1.000", "--rate 40.0"):
        assert expected in outcome.out
    assert "secret-key" not in outcome.out + file.read_text()


def test_arrivals_do_not_wait_for_answers(moiety: Callable) -> None:
    """In an open loop a slow server gets all requests at once, up to --max-in-flight; what arrives beyond is counted."""
    with openai_server() as server:
        server.first_s = 1.5
        words = ["--rate", "500", "--requests", "30", "--warmup", "0", "--output-tokens", "1"]
        assert "30 ok" in moiety("bench", "load", server.url, *words).out
        assert server.peak == 30
        outcome = moiety("bench", "load", server.url, *words, "--max-in-flight", "10", "--arrivals", "constant")
        assert "30 offered" in outcome.out
        assert "10 ok, 0 failed, 20 not sent, 0 unfinished; at most 10 in flight" in outcome.out


def test_closed_loop(moiety: Callable) -> None:
    """With --concurrency so many requests run at once, never more, until --seconds are over."""
    with openai_server() as server:
        server.first_s = 0.05
        words = ["--concurrency", "3", "--seconds", "0.5", "--output-tokens", "1"]
        outcome = moiety("bench", "load", server.url, *words)
    assert outcome.status == 0, outcome.err
    assert server.peak == 3
    assert len(server.bodies) > 3
    assert f"{len(server.bodies) - 1} ok" in outcome.out


def test_failures_by_kind(moiety: Callable) -> None:
    """A report counts failures by kind with the message of one, and measures the other requests."""
    faults = [None, Fault(429, "full"), Fault(chunks=1), Fault(events=('data: {"error": {"message": "lost"}}\n\n',))]
    with openai_server() as server:
        server.fault = lambda body, number: faults[number % 4]
        outcome = moiety("bench", "load", server.url, "--concurrency", "1", "--requests", "8", "--warmup", "0")
        assert outcome.status == 0, outcome.err
        for expected in (
            "2 ok, 6 failed",
            "2 x HTTP 429",
            ": full",
            "2 x connection lost",
            "2 x error event",
            ": lost",
        ):
            assert expected in outcome.out
        server.fault = lambda body, number: faults[1]
        outcome = moiety("bench", "load", server.url, "--concurrency", "1", "--requests", "2", "--warmup", "0")
        assert outcome.status == 1
        outcome = moiety("bench", "load", server.url, "--concurrency", "1")
        assert (outcome.status, outcome.out) == (1, "")
        assert "warm-up request to" in outcome.err
        assert "HTTP 429: full" in outcome.err


def test_a_server_that_counts_no_tokens(moiety: Callable) -> None:
    """Without a count from the server, chunks count, and the report says so."""
    with openai_server() as server:
        server.usage = False
        outcome = moiety("bench", "load", server.url, "--concurrency", "2", "--requests", "4", "--output-tokens", "5")
    assert "20 of outputs" in outcome.out
    assert "did not count the tokens of 4 answers" in outcome.out


def test_errors_name_what_is_wrong(moiety: Callable, tmp_path: Path) -> None:
    """No server, no such model, options that contradict each other, and a wrong file each give one clear error."""
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"prompt": "a"}\n{"prompt": ""}\n')
    with openai_server() as server:
        outcome = moiety("bench", "load", server.url, "--rate", "1", "--model", "third")
        assert outcome.err.endswith("serves no model 'third'; its models: first, second\n")
        outcome = moiety("bench", "load", server.url, "--rate", "1", "--dataset", str(wrong))
        assert (outcome.status, len(server.bodies)) == (1, 0)
        assert "line 2: prompt = ''" in outcome.err
    outcome = moiety("bench", "load", server.url, "--rate", "1")
    assert outcome.status == 1
    assert f"no connection: {server.url}: " in outcome.err
    outcome = moiety("bench", "load", server.url, "--rate", "1", "--concurrency", "2")
    assert outcome.status == 2
    assert "exactly one of --rate, --concurrency and --trace" in outcome.err
    for words in (["--goodput", "fast"], ["--extra", "[1]"], ["--input-tokens", "0"]):
        assert moiety("bench", "load", server.url, "--rate", "1", *words).status == 2


def test_ctrl_c_prints_what_there_is(moiety_process: Callable, tmp_path: Path) -> None:
    """SIGINT during a run ends it at once with the report of what was measured by then, and exit status 130."""
    file = tmp_path / "load.json"
    with openai_server() as server:
        process = moiety_process(
            "bench", "load", server.url, "--rate", "20", "--requests", "100000", "--json", str(file)
        )
        for line in process.stderr:
            if "sent," in line:
                break
        server.first_s = 60.0
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.strip().endswith("interrupted by SIGINT")
    assert "rerun:" in out
    assert json.loads(file.read_text())["ok"] > 10
