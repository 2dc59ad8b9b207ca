"""Peers as processes: started in their own environment, given orders, and stopped with SIGSTOP while others are measured."""

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
LINE_BYTES = 64 << 20
STOP_S = 20.0  # engines have processes of their own to end
POLL_S = 0.05
SHOWN_LINES = 3  # of a failed peer's log
# A stopped process would not notice that we are gone. This one does, by the end of its stdin, and ends the whole group.
KEEPER = "import os, signal, sys; sys.stdin.read(); os.killpg(int(sys.argv[1]), signal.SIGKILL)"


@dataclass(frozen=True, slots=True)
class PeerKind:
    """A module of `peers/`, and the Python that it runs in."""

    name: str  # for progress lines, and for rows while it has told no better one
    module: str
    python: str
    environment: Mapping[str, str]  # on top of ours


class Peer:
    """One peer with one checkpoint loaded."""

    def __init__(self, kind: PeerKind, scratch: Path):
        self.kind, self.name = kind, kind.name
        self._scratch = scratch
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        """Of its process, which leads its group; None before `start`."""
        return self._process.pid if self._process is not None else None

    @property
    def _log(self) -> Path:
        return self._scratch / "log"

    async def start(self, load: Mapping[str, Any], timeout_s: float) -> None:
        """Starts the process, loads, and leaves it stopped. Raises Unavailable with its own words where that fails."""
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
                    start_new_session=True,  # its group is what is stopped, with whatever it starts itself
                )
            except OSError as error:
                raise Unavailable(f"{self.kind.python}: {error.strerror}") from error
        self._keeper = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", "-c", KEEPER, str(self._process.pid)),
            stdin=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,  # where the group has ended by itself
            start_new_session=True,
        )
        told = await self._order({"load": {**load, "scratch": str(self._scratch)}}, timeout_s)
        self.name = str(told["system"])
        self._signal(signal.SIGSTOP)

    async def run(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, timeout_s: float
    ) -> tuple[float, list[list[float]]]:
        """(start, each prompt's token times) on one clock in seconds. Raises Unavailable where the peer failed."""
        self._signal(signal.SIGCONT)
        try:
            told = await self._order({"run": {"prompts": prompts, "new_tokens": new_tokens}}, timeout_s)
        finally:
            self._signal(signal.SIGSTOP)
        return told["began"], told["arrivals"]

    async def stop(self) -> None:
        """Ends the process and what it started; nothing is left if it does not want to."""
        if self._process is None or self._process.stdin is None:
            return
        self._signal(signal.SIGCONT)
        self._process.stdin.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_S):
                await self._process.wait()
                # Its own children end after it, and take their shared memory with them.
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
            raise Unavailable(f"the process ended: {self._last_words()}")
        told: dict[str, Any] = json.loads(line)
        if "error" in told:
            raise Unavailable(str(told["error"]).splitlines()[0])
        return told

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _last_words(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return " / ".join(lines[-SHOWN_LINES:]) or "without a word"


def _alive(group: int) -> bool:
    """Whether any process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _outer_environment() -> dict[str, str]:
    """Ours, less what would bring our packages or our thread settings into another's environment."""
    ours = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "OMP_WAIT_POLICY", "OMP_NUM_THREADS", "THP_MEM_ALLOC_ENABLE")
    return {name: value for name, value in os.environ.items() if name not in ours}
