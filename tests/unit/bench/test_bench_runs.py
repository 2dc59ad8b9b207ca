"""Benchmarks end to end, each once through its command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moiety.cli.main import run


@pytest.mark.slow
def test_bench_hop(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Every payload gives a row of positive times for each transport, and the report prints the command line.

    Slow: it starts its own system.
    """
    file = tmp_path / "hop.json"
    words = ["bench", "hop", "--payload", "4,64", "--calls", "10", "--rounds", "1"]
    assert run([*words, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    transports = ("shm", "grpc")
    assert [(row["payload_kib"], row["transport"]) for row in rows] == [(n, t) for n in (4, 64) for t in transports]
    for row in rows:
        assert row["calls"] == 10
        assert 0 < row["hop_p50_ms"] < row["call_p50_ms"]
        assert row["ratio"] == pytest.approx(row["hop_p50_ms"] / row["echo_p50_ms"])
    shown = capsys.readouterr().out
    assert "cores" in shown
    assert " ".join(["moiety", *words]) in shown


@pytest.mark.slow
def test_bench_serve(capsys: pytest.CaptureFixture[str], tiny: Callable[[str], str], tmp_path: Path) -> None:
    """Every system is measured in every cell, ratios are to the best peer, and a system that cannot start is reported.

    Slow: it starts its own system, and one process of transformers.
    """
    file = tmp_path / "serve.json"
    words = ["--concurrency", "1,3", "--prompts", "8", "--new", "5", "--dtype", "float32", "--rounds", "1"]
    unusable = tmp_path / "unusable"
    unusable.touch()
    model = tiny("qwen3_moe")
    assert run(["bench", "serve", "--models", model, "--vllm", str(unusable), *words, "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert report["machine"]["read_bytes_per_s"] > 0
    rows = report["rows"]
    assert [(row["concurrency"], row["system"].split()[0]) for row in rows] == [
        *((1, system) for system in ("moiety", "transformers", "vLLM")),
        *((3, system) for system in ("moiety", "transformers", "vLLM")),
    ]
    for served, plain, failed in (rows[:3], rows[3:]):
        for row in (served, plain):
            assert row["model"] == Path(model).name
            assert row["prompt_tokens"] == 8
            assert row["rounds"] == 1
            assert row["failed"] is None
            assert row["prefill_tokens_per_s"] > 0
            assert 0 < row["itl_p50_ms"] <= row["itl_p99_ms"]
            assert row["step_over_floor"] == pytest.approx(row["itl_p50_ms"] / row["floor_ms"])
        assert plain["ratio_to_best_peer"] == plain["prefill_ratio_to_best_peer"] == 1
        ratio = served["decode_tokens_per_s"] / plain["decode_tokens_per_s"]
        assert served["ratio_to_best_peer"] == pytest.approx(ratio)
        assert failed["decode_tokens_per_s"] is None
        assert failed["failed"] == f"{unusable}: Permission denied"
    shown = capsys.readouterr().out
    assert "torch" in shown
    assert f"FAILED: vLLM CPU ({Path(model).name})" in shown


def test_bench_serve_outside_context(capsys: pytest.CaptureFixture[str], tiny: Callable[[str], str]) -> None:
    """Prompts that do not fit the model's context are refused before anything starts."""
    assert run(["bench", "serve", "--models", tiny("qwen3_moe"), "--prompts", "500", "--new", "64"]) == 1
    stderr = capsys.readouterr().err
    assert "error: setting prompt + new tokens = 564: must be at most 512, the model's context" in stderr


@pytest.mark.slow
def test_bench_split(tiny: Callable[[str], str], tmp_path: Path) -> None:
    """Both engines run at every concurrency, and layers have compute and hop times. Slow: it starts its own cluster."""
    file = tmp_path / "split.json"
    words = ["--concurrency", "1,3", "--prompt", "8", "--new", "6", "--dtype", "float32", "--rounds", "1"]
    assert run(["bench", "split", "--model", tiny("qwen3_moe"), *words, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["concurrency"] for row in rows] == [1, 3]
    for row in rows:
        assert row["itl_ratio"] == pytest.approx(row["split_itl_p50_ms"] / row["one_process_itl_p50_ms"])
        assert row["hop_ms"] > 0
        assert row["compute_ms"] > 0
        assert row["one_process_compute_ms"] > 0
        assert 1 <= row["imbalance"] <= 2


@pytest.mark.slow
def test_bench_lanes(tiny: Callable[[str], str], tmp_path: Path) -> None:
    """All three engines run at every concurrency, with their ratios. Slow: it starts its own cluster and three routers."""
    file = tmp_path / "lanes.json"
    words = ["--concurrency", "1,3", "--prompt", "8", "--new", "6", "--dtype", "float32", "--rounds", "1"]
    assert run(["bench", "lanes", "--model", tiny("qwen3_moe"), *words, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["concurrency"] for row in rows] == [1, 3]
    for row in rows:
        assert row["two_lanes_ratio"] == pytest.approx(row["two_lanes_tokens_per_s"] / row["one_piece_tokens_per_s"])
        assert row["measured_ratio"] == pytest.approx(row["measured_tokens_per_s"] / row["one_piece_tokens_per_s"])


def test_bench_lanes_outside_context(capsys: pytest.CaptureFixture[str], tiny: Callable[[str], str]) -> None:
    """Prompts that do not fit the model's context are refused before anything starts."""
    assert run(["bench", "lanes", "--model", tiny("qwen3_moe"), "--prompt", "500", "--new", "64"]) == 1
    stderr = capsys.readouterr().err
    assert "error: setting prompt + new tokens = 564: must be at most 512, the model's context" in stderr


@pytest.mark.slow
def test_bench_flood(capsys: pytest.CaptureFixture[str], tiny: Callable[[str], str], tmp_path: Path) -> None:
    """Beyond capacity, requests are refused with a retry delay and the others are served. Slow: it offers load for seconds."""
    file = tmp_path / "flood.json"
    words = ["--slots", "2", "--queue", "2", "--loads", "4", "--seconds", "4", "--new", "16", "--rounds", "1"]
    run(["bench", "flood", "--model", tiny("qwen3_moe"), "--dtype", "float32", *words, "--json", str(file)])
    capacity, flooded = json.loads(file.read_text())["rows"]
    assert capacity["tokens_per_s"] > 0
    assert flooded["accepted"] > 0
    assert 0 < flooded["refused"] == flooded["refused_with_hint"]
    assert flooded["failed"] == 0
    assert "of the peak" in capsys.readouterr().out
