"""`moiety chat` as its own process, in a terminal or through pipes, against a real gateway over a fake engine."""

from __future__ import annotations

import asyncio
import os
import pty
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moiety.gateway.text.tokenizer import Tokenizer
from moiety.testing import FakeEngine, eventually, fake_shape
from support.gateways import gateway_over

CTRL_C, CTRL_D = "\x03", "\x04"
# Makes the terminal the process's own, so that Ctrl-C becomes a signal, then runs the command.
IN_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "moiety.cli.main", *sys.argv[1:]])
"""
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|[\x01\x02\r]")


@dataclass(slots=True)
class Served:
    """A gateway's address, and the engine behind it."""

    address: str
    engine: FakeEngine
    tokenizer: Tokenizer

    def reply(self, text: str) -> None:
        """Makes this the reply to every message."""
        self.engine.script = self.tokenizer.encode(text, begin=False)

    def prompt(self, number: int = -1) -> str:
        """Returns the text of one of the prompts that the engine has got."""
        return self.tokenizer.decode(list(self.engine.requests[number].prompt_ids), special=True)


@asynccontextmanager
async def served(folder: Path, *, max_context: int = 2000, chats: bool = True) -> AsyncIterator[Served]:
    """A gateway with the tokenizer of `folder`, with or without its chat template."""
    tokenizer = Tokenizer(str(folder))
    engine = FakeEngine("a", fake_shape(max_context=max_context))
    template = tokenizer.chat_template() if chats else None
    try:
        async with gateway_over(tokenizer, engine, template=template, within_s=100.0) as gateway:
            yield Served(gateway.address, engine, tokenizer)
    finally:
        if template is not None:
            template.close()


class Terminal:
    """A terminal in which `moiety chat` runs."""

    def __init__(self, master: int, process: asyncio.subprocess.Process):
        self._master, self.process = master, process
        self.raw = ""  # what came since the last `until`
        asyncio.get_running_loop().add_reader(master, self._read)

    def _read(self) -> None:
        try:
            self.raw += os.read(self._master, 65536).decode(errors="replace")
        except OSError:  # the process has ended
            asyncio.get_running_loop().remove_reader(self._master)

    @property
    def text(self) -> str:
        """`raw` without escape sequences."""
        return _ESCAPES.sub("", self.raw)

    def type(self, text: str) -> None:
        """Presses keys."""
        os.write(self._master, text.encode())

    async def until(self, text: str) -> str:
        """Waits for `text` and returns all that came since the last call."""
        try:
            await eventually(lambda: text in self.text, within_s=30.0)
        except TimeoutError:
            raise AssertionError(f"{text!r} did not come, but: {self.text!r}") from None
        seen, self.raw = self.text, ""
        return seen

    async def say(self, line: str, until: str) -> str:
        """Enters a line at the prompt, which must be there, and waits for `until` and the next prompt."""
        self.type(f"{line}\r")
        seen = await self.until(until)
        # The prompt may be part of what `until` has seen already, in one piece or begun.
        await eventually(lambda: (seen + self.text).endswith("> "), within_s=30.0)
        seen, self.raw = seen + self.text, ""
        return seen

    async def ended(self) -> int:
        """Waits until the process has ended; returns its exit status."""
        async with asyncio.timeout(30):
            return await self.process.wait()


@asynccontextmanager
async def terminal(address: str, *words: str, state: Path, **environment: str) -> AsyncIterator[Terminal]:
    """`moiety chat` in a terminal of its own, with `state` as the folder of its history."""
    master, slave = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", IN_TERMINAL, "chat", "--address", address, *words),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        env={**os.environ, "TERM": "xterm", "INPUTRC": os.devnull, "XDG_STATE_HOME": str(state), **environment},
    )
    os.close(slave)
    opened = Terminal(master, process)
    try:
        yield opened
    finally:
        asyncio.get_running_loop().remove_reader(master)
        if process.returncode is None:
            process.kill()
            await process.wait()
        os.close(master)


async def piped(address: str, text: str, *words: str, **environment: str) -> tuple[int, str, str]:
    """Runs `moiety chat` with `text` as its stdin; returns exit status, stdout and stderr."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "moiety.cli.main", "chat", "--address", address, *words),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **environment},
    )
    try:
        async with asyncio.timeout(60):
            out, err = await process.communicate(text.encode())
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


def temperature(engine: FakeEngine, number: int = -1) -> Any:
    """Returns the temperature of one of the engine's requests."""
    return round(engine.requests[number].sampling.temperature, 3)
