"""Runs peers, the systems that Moiety is compared with, as processes in their own Python environments.

A peer gets orders on its stdin. Between orders, its process is halted with SIGSTOP.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moiety.errors import Unavailable

MAIN = Path(__file__).parent / "peers" / "main.py"
LINE_BYTES = 64 << 20  # longest answer of a peer
STOP_S = 20.0  # longest wait for a peer to end; engines first end their own child processes
POLL_S = 0.05
SHOWN_LINES = 3  # last lines of a failed peer's log in the error
# A peer under SIGSTOP cannot notice that its parent ended. The keeper can, by the end of its stdin, and kills the peer's group.
KEEPER = "import os, signal, sys; sys.stdin.read(); os.killpg(int(sys.argv[1]), signal.SIGKILL)"


@dataclass(frozen=True, slots=True)
class PeerKind:
    """How to start a peer: its module in `peers/`, the Python that runs it, and environment variables."""

    name: str  # for progress lines, and for rows until the peer reports its own name
    module: str
    python: str  # path of the interpreter
    environment: Mapping[str, str]  # variables added to those of this process


class Peer:
    """The process of one peer with one checkpoint loaded."""

    def __init__(self, kind: PeerKind, scratch: Path):
        self.kind, self.name = kind, kind.name
        self._scratch = scratch
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the peer, which leads its process group; None before `start`."""
        return self._process.pid if self._process is not None else None

    @property
    def _log(self) -> Path:
        return self._scratch / "log"

    async def start(self, load: Mapping[str, Any], timeout_s: float) -> None:
        """Starts the process, loads the model, and halts the process with SIGSTOP. Raises Unavailable with the peer's error."""
        self._scratch.mkdir(parents=True, exist_ok=True)
        threads = str(load["threads"])
        with self._log.open("wb") as log:
            try:
                self._process = await asyncio.create_subprocess_exec(
                    self.kind.python,
                    str(MAIN),
                    self.kind.module,
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=log,
                    env={**_outer_environment(), "OMP_NUM_THREADS": threads, **self.kind.environment},
                    limit=LINE_BYTES,
                    start_new_session=True,  # signals then go to its process group, which includes its children
                )
            except OSError as error:
                raise Unavailable(f"{self.kind.python}: {error.strerror}") from error
        self._keeper = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", "-c", KEEPER, str(self._process.pid)),
            stdin=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,  # its kill fails if the peer's group has ended already
            start_new_session=True,
        )
        answer = await self._order({"load": {**load, "scratch": str(self._scratch)}}, timeout_s)
        self.name = str(answer["system"])
        self._signal(signal.SIGSTOP)

    async def run(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, timeout_s: float
    ) -> tuple[float, list[list[float]]]:
        """Generates `new_tokens` tokens per prompt. Returns (start, each prompt's token times) in seconds on one clock.

        Raises Unavailable where the peer fails.
        """
        self._signal(signal.SIGCONT)
        try:
            answer = await self._order({"run": {"prompts": prompts, "new_tokens": new_tokens}}, timeout_s)
        finally:
            self._signal(signal.SIGSTOP)
        return answer["began"], answer["arrivals"]

    async def stop(self) -> None:
        """Ends the process and its child processes. After STOP_S, kills those that still run."""
        if self._process is None or self._process.stdin is None:
            return
        self._signal(signal.SIGCONT)
        self._process.stdin.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_S):
                await self._process.wait()
                # The peer's own children end after it, and free their shared memory then.
                while _alive(self._process.pid):
                    await asyncio.sleep(POLL_S)
        if self._keeper is not None and self._keeper.stdin is not None:
            self._keeper.stdin.close()
            await self._keeper.wait()
        await self._process.wait()

    async def _order(self, order: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            async with asyncio.timeout(timeout_s):
                process.stdin.write(json.dumps(order).encode() + b"\n")
                await process.stdin.drain()
                line = await process.stdout.readline()
        except TimeoutError:
            raise Unavailable(f"no answer within {timeout_s:.0f} s") from None
        except ConnectionError:
            line = b""
        if not line:
            raise Unavailable(f"the process ended: {self._log_tail()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Unavailable(str(answer["error"]).splitlines()[0])
        return answer

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _log_tail(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return " / ".join(lines[-SHOWN_LINES:]) or "its log is empty"


def _alive(group: int) -> bool:
    """Returns whether the process group `group` still has a process."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _outer_environment() -> dict[str, str]:
    """Returns the environment without variables that point to Moiety's Python packages or tune threads and memory."""
    excluded = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "OMP_WAIT_POLICY", "OMP_NUM_THREADS", "THP_MEM_ALLOC_ENABLE")
    return {name: value for name, value in os.environ.items() if name not in excluded}
