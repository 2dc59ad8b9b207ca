"""What reaches a command and leaves it as bytes: other encodings, closed pipes, terminals, Ctrl-C."""

from __future__ import annotations

import asyncio
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from moiety.testing import HOST
from moiety.v1 import generation_pb2, generation_pb2_grpc
from moiety.wire.server import Server
from moiety.wire.service_names import GENERATION_SERVICE

NOBODY = f"{HOST}:1"
LINE = [sys.executable, "-m", "moiety.cli.main"]
C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def run(*words: str | bytes, stdin: bytes = b"", **environment: str) -> tuple[int, str]:
    """Runs `moiety` as a process; returns its exit status and the last line of its stderr."""
    done = subprocess.run(
        [*LINE, *words], input=stdin, capture_output=True, timeout=60, env={**os.environ, **environment}, check=False
    )
    return done.returncode, done.stderr.decode().strip().rpartition("\n")[2]


def test_text_in_another_encoding_is_refused(tmp_path: Path) -> None:
    """Latin-1 as an argument, on stdin or in a file: the error names the field and the byte."""
    (tmp_path / "schema.json").write_bytes(b'{"enum": [\n"caf\xe9"]}')
    address = ("--address", NOBODY)
    status, said = run("generate", b"caf\xe9", *address)
    assert (status, said.endswith("'PROMPT': 'caf\\udce9': character 4 is the byte 0xe9, which is not UTF-8")) == (
        2,
        True,
    )
    status, said = run("generate", "-", *address, stdin=b"caf\xe9 au lait")
    assert (status, "prompt.text = " in said, "character 4 is the byte 0xe9" in said) == (1, True, True)
    status, said = run("generate", "x", *address, "--json-schema", str(tmp_path / "schema.json"))
    assert (status, said.endswith("schema.json, line 2: the byte 0xe9 is not UTF-8")) == (2, True)


def test_utf8_in_the_c_locale() -> None:
    """Where Python takes text for ASCII, a UTF-8 argument and stdin are read as what they are."""
    for words, stdin in ((("generate", "café 漢字"), b""), (("generate", "-"), "café".encode())):
        status, said = run(*words, "--address", NOBODY, stdin=stdin, **C_LOCALE)
        assert (status, said) == (1, f"error: gateway {NOBODY}: nobody listens there (connection refused)")


def test_a_closed_pipe_is_quiet() -> None:
    """When the reader of its output has gone, a command ends without a word."""
    with subprocess.Popen([*LINE, "settings"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_ctrl_c_while_a_command_is_imported(tmp_path: Path) -> None:
    """It ends at once with status 130 and one line, although an import may take any exception for a missing package."""
    (tmp_path / "click_slow.py").write_text("import time; open('begun', 'w').close(); time.sleep(60)")
    script = (
        "import sys, moiety.cli.main as main\n"
        "main.cli.get_command = lambda *_: __import__('click_slow')\n"
        "sys.argv = ['moiety', 'settings']\n"
        "main.main()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen(
        [sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment
    ) as process:
        until = time.monotonic() + 30
        while not (tmp_path / "begun").exists():
            assert time.monotonic() < until
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err.strip()) == (130, "interrupted by SIGINT")


class Escaping(generation_pb2_grpc.GenerationServiceServicer):
    """Answers each request with an escape sequence."""

    async def Generate(self, *_: object) -> AsyncIterator[generation_pb2.GenerateResponse]:
        yield generation_pb2.GenerateResponse(text="a\x1b]0;title\x07b", token_ids=[1])
        yield generation_pb2.GenerateResponse(finish_reason=generation_pb2.FINISH_REASON_LENGTH)


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="this system has no pseudo-terminals")
async def test_a_generation_cannot_command_a_terminal() -> None:
    """A terminal shows replacement characters where the model wrote control characters; a pipe gets the text as it is."""
    server = Server([], [GENERATION_SERVICE])
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(Escaping(), server.grpc)
    line = [*LINE, "generate", "x", "--address", f"{HOST}:{await server.start(HOST, 0)}"]
    ours, theirs = pty.openpty()
    shown = await asyncio.create_subprocess_exec(*line, stdout=theirs)
    os.close(theirs)
    assert await shown.wait() == 0
    assert _read(ours).strip() == "a\ufffd]0;title\ufffdb"
    piped = await asyncio.create_subprocess_exec(*line, stdout=asyncio.subprocess.PIPE)
    assert (await piped.communicate())[0] == b"a\x1b]0;title\x07b\n"
    await server.stop(0)


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="this system has no pseudo-terminals")
def test_no_control_characters_reach_a_terminal(tmp_path: Path) -> None:
    """An error that quotes an escape sequence shows a replacement character; a pipe gets what was said."""
    name = str(tmp_path / "\x1b]0;title\x07")
    ours, theirs = pty.openpty()
    with subprocess.Popen([*LINE, "batch", name, "out"], stderr=theirs, stdout=subprocess.DEVNULL) as process:
        os.close(theirs)
        shown = _read(ours)
        process.wait(60)
    assert "does not exist" in shown
    assert "\x1b" not in shown
    assert "\x07" not in shown


def _read(descriptor: int) -> str:
    pieces = []
    try:
        while piece := os.read(descriptor, 1 << 16):
            pieces.append(piece)
    except OSError:  # EIO: the other end is closed
        pass
    os.close(descriptor)
    return b"".join(pieces).decode()
