"""Each benchmark once, end to end, through its command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moiety.cli.main import run


def test_bench_hop(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Every payload gives one row of positive times, and the report says how to run it again."""
    file = tmp_path / "hop.json"
    words = ["bench", "hop", "--payload", "4,64", "--calls", "10", "--rounds", "1"]
    assert run([*words, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert [row["payload_kib"] for row in rows] == [4, 64]
    for row in rows:
        assert row["calls"] == 10
        assert 0 < row["hop_p50_ms"] < row["call_p50_ms"]
        assert row["ratio"] == pytest.approx(row["hop_p50_ms"] / row["echo_p50_ms"])
    told = capsys.readouterr().out
    assert "cores" in told
    assert " ".join(["moiety", *words]) in told


def test_bench_serve(capsys: pytest.CaptureFixture[str], tiny: Callable[[str], str], tmp_path: Path) -> None:
    """Both systems are measured at every concurrency, and the ratio is to plain transformers."""
    file = tmp_path / "serve.json"
    words = ["--concurrency", "1,3", "--prompt", "8", "--new", "5", "--dtype", "float32", "--rounds", "1"]
    assert run(["bench", "serve", tiny("qwen3_moe"), *words, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert [(row["concurrency"], row["system"].split()[0]) for row in rows] == [
        (1, "moiety"),
        (1, "transformers"),
        (3, "moiety"),
        (3, "transformers"),
    ]
    for row in rows:
        assert list(row) == [
            "model",
            "concurrency",
            "system",
            "decode_tokens_per_s",
            "itl_p50_ms",
            "itl_p99_ms",
            "ttft_p50_ms",
            "prefill_tokens_per_s",
            "ratio",
        ]
        assert row["decode_tokens_per_s"] > 0
        assert row["prefill_tokens_per_s"] > 0
        assert 0 < row["itl_p50_ms"] <= row["itl_p99_ms"]
    for served, plain in (rows[:2], rows[2:]):
        assert plain["ratio"] == 1
        assert served["ratio"] == pytest.approx(served["decode_tokens_per_s"] / plain["decode_tokens_per_s"])
    assert "torch" in capsys.readouterr().out


def test_bench_serve_outside_context(capsys: pytest.CaptureFixture[str], tiny: Callable[[str], str]) -> None:
    """Prompts that do not fit the model are refused before anything is started."""
    assert run(["bench", "serve", tiny("qwen3_moe"), "--prompt", "500", "--new", "64"]) == 1
    told = capsys.readouterr().err
    assert "error: setting prompt + new = '500 + 64': at most 512, the model's context" in told
