"""What a newcomer types wrong, and the sentence that comes back: before anything heavy starts, without a traceback."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from moiety.cli.main import run
from moiety.testing import HOST

WITHIN_S = 50.0  # ten times what a quiet machine may take
USAGE, FAILED = 2, 1


@dataclass(frozen=True, slots=True)
class Wrong:
    """A command line, with places in braces, and what it must be told."""

    line: str
    says: str  # a regular expression
    status: int = FAILED
    alone: bool = (
        False  # in a process of its own, imports included; `serve` too, which must not find this session's Ray
    )


FREE = "--grpc-port 0 --http-port 0"
COMMANDS = (
    Wrong("serv {model}", r"No such command 'serv'; did you mean 'serve'\?", USAGE, alone=True),
    Wrong("bench hopp", r"No such command 'hopp'; did you mean 'hop'\?", USAGE),
    Wrong("generate hello --temprature 1", r"No such option '?--temprature'?.*--temperature", USAGE),
    Wrong("generate", "Missing argument 'PROMPT'", USAGE),
    Wrong("generate hello --address {nobody}", r"error: gateway {nobody}: nobody listens there", alone=True),
    Wrong("generate hello --address localhost", "'localhost': no port from 1 to 65535 .* HOST:PORT, such as", USAGE),
    Wrong("generate hello --address http://localhost:1", "leave out http://", USAGE),
    Wrong("generate hello --address me:hunter2@{nobody}", "'{nobody}': an address has no user and no password", USAGE),
    Wrong("generate hello --temperature nan", "nan is not a finite number", USAGE),
    Wrong("chat --address {nobody}", r"error: gateway {nobody}: nobody listens there \(connection refused\)"),
    Wrong("batch {requests} {folder}/out.jsonl --url http://{nobody} --patience 0", "no connection: http://{nobody}"),
    Wrong("batch {requests} /no/such/folder/out.jsonl", "/no/such/folder is not a folder", USAGE),
    Wrong("serve {folder}/nope", "neither a folder nor a Hugging Face id", USAGE),
    Wrong("serve {folder}", r"error: .*{folder}"),
    Wrong("serve {gguf}", "GGUF"),
    Wrong("serve {no_tokenizer} " + FREE, "tokenizer", alone=True),
    Wrong("serve {model} --set router.slotz=3", r"router\.slotz: unknown; did you mean router\.slots\?", alone=True),
    Wrong("serve {model} --set registri=redis://:hunter2@h", r"registri: unknown; did you mean registry\?"),
    Wrong("serve {model} --dtype int3", "dtype = 'int3': must be auto, float32, bfloat16 or float16"),
    Wrong("serve {model} --groups 50", "groups = 50: must be 1 to 8, the model's experts per layer"),
    Wrong("serve {model} --kv-memory abc", r"router\.kv_memory = 'abc': must be a number of bytes of at least 1KiB"),
    Wrong("serve {model} --kv-memory 900TiB " + FREE, r"router\.kv_memory = .*: must be at most", alone=True),
    Wrong("serve {model} --grpc-port {taken}", r"gateway\.port = {taken}: another program listens at", alone=True),
    Wrong("serve {model} --ray-address {nobody} " + FREE, r"--ray-address {nobody}: no Ray answers", alone=True),
    Wrong("serve {model} --registry redis://:hunter2@{nobody}/0 " + FREE, "registry redis://{nobody}/0"),
    Wrong("serve {model} --config {serve_yaml}", "is a configuration of Ray Serve"),
    Wrong("serve {model} --config {twice_yaml}", "'groups' stands here a second time"),
    Wrong("inspect {model} --memory abc", "'abc': must be a number of bytes, such as 24GiB", USAGE),
    Wrong("quantize {model} --memory 1KiB --out {folder}/q", "memory = 1024: must be at least"),
    Wrong("parity {model} --groups 50", "groups = 50: must be 1 to 8, the model's experts per layer", alone=True),
    Wrong("bench serve --models {model} --groups 50", "groups = 50: must be 1 to 8"),
    Wrong("simulate --plot /no/such/folder/x.png", "/no/such/folder is not a folder", USAGE),
    Wrong("rebalance --registry redis://{nobody}/0", "registry redis://{nobody}/0"),
    Wrong("stop", "no system that `moiety serve` started runs on this machine"),
)


@pytest.fixture
def places(tiny: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mapping[str, str]]:
    """Yields what stands for the braces: a checkpoint, an empty folder, an address where nobody listens, and so on."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))  # where no system of this user is recorded
    files = {"gguf": tmp_path / "model.gguf", "requests": tmp_path / "in.jsonl", "serve_yaml": tmp_path / "serve.yaml"}
    files["gguf"].write_bytes(b"GGUF\3\0\0\0")
    files["requests"].write_text(
        '{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}'
    )
    files["serve_yaml"].write_text("applications: [{name: moiety, import_path: 'moiety.deploy.app:build'}]")
    files["twice_yaml"] = tmp_path / "twice.yaml"
    files["twice_yaml"].write_text("groups: 1\ngroups: 2")
    (tmp_path / "empty").mkdir()
    without = shutil.ignore_patterns("tokenizer*")
    bare = shutil.copytree(tiny("mixtral"), tmp_path / "bare", ignore=without)
    with ExitStack() as ends, socket.create_server((HOST, 0)) as closed:
        taken = ends.enter_context(socket.create_server((HOST, 0)))
        nobody = f"{HOST}:{closed.getsockname()[1]}"
        closed.close()
        others = {
            "model": tiny("mixtral"),
            "folder": str(tmp_path / "empty"),
            "nobody": nobody,
            "no_tokenizer": str(bare),
        }
        yield {**others, **{name: str(file) for name, file in files.items()}, "taken": str(taken.getsockname()[1])}


@pytest.mark.parametrize("wrong", COMMANDS, ids=lambda wrong: wrong.line)
def test_a_wrong_command_is_told_why(
    wrong: Wrong, places: Mapping[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    """The sentence names what is wrong and what would be right; the exit status tells usage from failure."""
    words = wrong.line.format(**places).split()
    began = time.monotonic()
    if wrong.alone:
        command = [sys.executable, "-m", "moiety.cli.main", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=2 * WITHIN_S, check=False)
        status, err = done.returncode, done.stderr
    else:
        status = run(words)
        err = capfd.readouterr().err
    assert time.monotonic() - began < WITHIN_S
    _check(wrong, places, status, err)


def _check(wrong: Wrong, places: Mapping[str, str], status: int, err: str) -> None:
    said = " ".join(err.split())
    assert re.search(wrong.says.format(**{name: re.escape(text) for name, text in places.items()}), said), said
    assert status == wrong.status
    for raw in ("Traceback", "hunter2", "Input should", "failed to connect to all addresses", "Deadline Exceeded"):
        assert raw not in said
    if wrong.status == FAILED:
        assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1
