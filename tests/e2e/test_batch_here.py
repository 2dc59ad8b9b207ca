"""`moiety batch --model`: the command serves the checkpoint for the time of the run."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest

from moiety.cli.main import run
from moiety.synthetic import write_tiny


def test_a_batch_serves_its_own_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Every request is answered and no process is left; a second run, which has nothing to send, starts none."""
    folder = write_tiny("qwen3_moe", tmp_path / "tiny-chat", chat=True)
    bodies = [
        {"url": "/v1/completions", "body": {"model": "tiny-chat", "prompt": f"number {number}", "max_tokens": 4}}
        for number in range(5)
    ]
    message = {"role": "user", "content": "hello"}
    bodies.append({"url": "/v1/chat/completions", "body": {"messages": [message], "max_tokens": 4}})
    lines = [{"custom_id": f"r{place}", "method": "POST", **each} for place, each in enumerate(bodies)]
    (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    files = [str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")]
    assert run(["batch", *files, "--model", str(folder), "--dtype", "float32"]) == 0, capsys.readouterr().err
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sorted(answer["custom_id"] for answer in answers) == [f"r{place}" for place in range(6)]
    assert {answer["response"]["body"]["usage"]["completion_tokens"] for answer in answers} == {4}
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
    capsys.readouterr()
    assert run(["batch", *files, "--model", str(folder)]) == 0
    assert "start:" not in capsys.readouterr().err


def test_a_model_without_a_tokenizer_takes_token_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """With --skip-tokenizer a batch of token ids is answered with token ids, and a text is refused with the reason."""
    folder = write_tiny("qwen3_moe", tmp_path / "bare")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    bodies = [{"prompt": prompt, "max_tokens": 4, "return_token_ids": True} for prompt in ([5, 6, 7], "text")]
    lines = [
        {"custom_id": f"r{place}", "method": "POST", "url": "/v1/completions", "body": body}
        for place, body in enumerate(bodies)
    ]
    (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    files = [str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")]
    assert run(["batch", *files, "--model", str(folder), "--groups", "1", "--skip-tokenizer"]) == 1, (
        capsys.readouterr().err
    )
    answer = json.loads((tmp_path / "out.jsonl").read_text())
    assert len(answer["response"]["body"]["choices"][0]["token_ids"]) == 4
    assert "this gateway has no tokenizer" in (tmp_path / "out.errors.jsonl").read_text()


def test_one_server_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """--url and --model exclude each other; --revision and --skip-tokenizer need --model."""
    (tmp_path / "in.jsonl").write_text("")
    files = [str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")]
    assert run(["batch", *files, "--model", str(tmp_path), "--url", "http://127.0.0.1:1"]) == 2
    assert "exclude each other" in capsys.readouterr().err
    for words in (["--revision", "main"], ["--skip-tokenizer"]):
        assert run(["batch", *files, *words]) == 2
        assert f"{words[0]} needs --model" in capsys.readouterr().err
