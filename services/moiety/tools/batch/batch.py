"""`moiety batch`: sends the requests of a file, a bounded number at once, and appends their results to two files."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from moiety.client.http.server import OpenAiServer, RequestFailed, allow_connections
from moiety.errors import InvalidRequest, MoietyError
from moiety.tools.batch.answer import NOT_ALLOWED, Patience, answer_to
from moiety.tools.batch.lines import BatchLine, check_input, read_lines
from moiety.tools.batch.results import ResultFile
from moiety.tools.batch.server import OpenServer

Show = Callable[[str], None]
SHOW_EVERY_S = 5.0
SKIPPED_AT_ONCE = 256  # lines, before other tasks get their turn


@dataclass(frozen=True, slots=True)
class BatchWork:
    """The files of a batch, the server, and how to ask it."""

    input: Path
    output: Path
    errors: Path
    server: OpenServer  # opened once something is to be sent
    concurrency: int = 32
    timeout_s: float = 600.0  # of one request
    patience: Patience = field(default_factory=Patience)
    retry_failed: bool = False  # send again what an earlier run has in `errors`

    def __post_init__(self) -> None:
        """Raises InvalidRequest where two of the files are the same."""
        files = {"INPUT": self.input, "OUTPUT": self.output, "--errors": self.errors}
        if len({file.resolve() for file in files.values()}) < len(files):
            named = ", ".join(f"{name} {file}" for name, file in files.items())
            raise InvalidRequest("files", named, "three different files")


@dataclass(slots=True)
class BatchCounts:
    """How far a batch is. `earlier` counts the requests that an earlier run had finished."""

    total: int = 0
    earlier: int = 0
    done: int = 0  # in OUTPUT, earlier ones included
    failed: int = 0  # in ERRORS, likewise
    output_tokens: int = 0  # of this run

    @property
    def left(self) -> int:
        return self.total - self.done - self.failed


class BatchRun:
    """One run of a batch. `counts` is right at any time, also after `run` was cancelled."""

    def __init__(self, work: BatchWork, api_key: str | None = None, *, progress: Show = lambda _: None) -> None:
        self.work, self.counts = work, BatchCounts()
        self._api_key, self._progress = api_key, progress
        self._waiting: set[bytes] = set()  # keys of the requests without a result
        self._began = time.monotonic()

    async def run(self) -> None:
        """Sends what has no result yet, and returns when all have one.

        Raises InvalidRequest for a wrong line or file, FailedPrecondition if a file cannot be written or the server refuses
        the key, RequestFailed or Unavailable if the server does not answer. What has been answered by then is in the files.
        """
        work = self.work
        self._progress(f"check: {work.input}")
        self._waiting = await asyncio.to_thread(check_input, work.input)
        self.counts.total = len(self._waiting)
        with ResultFile(work.output) as output, ResultFile(work.errors) as errors:
            await asyncio.to_thread(self._recover, output, errors)
            if self.counts.earlier:
                self._progress(f"resume: {self.counts.done} done and {self.counts.failed} failed earlier")
            if not self.counts.left:
                return
            allow_connections(min(work.concurrency, self.counts.left))
            async with (
                work.server() as url,
                OpenAiServer(url, api_key=self._api_key, timeout_s=work.timeout_s) as server,
            ):
                await _check(server)
                self._progress(
                    f"send: {self.counts.left} of {self.counts.total} to {server.url}, {work.concurrency} at once"
                )
                await self._send_all(server, output, errors)

    def _recover(self, output: ResultFile, errors: ResultFile) -> None:
        """Leaves in `_waiting` what is to be sent. Raises InvalidRequest for a result of a request that INPUT does not have."""
        self.counts.done = len(self._finished(output))
        failed = self._finished(errors)
        if self.work.retry_failed:
            errors.clear()
            self._waiting.update(failed)
        else:
            self.counts.failed = len(failed)
        self.counts.earlier = self.counts.done + self.counts.failed

    def _finished(self, file: ResultFile) -> list[bytes]:
        """Takes the requests that have a result in `file` out of `_waiting`, and returns their keys."""
        keys = []
        for number, custom_id, key in file.recover():
            if key not in self._waiting:
                bound = f"that of a request of {self.work.input}, which has no other result"
                raise InvalidRequest(f"{file.file}: line {number}: custom_id", custom_id, bound)
            self._waiting.remove(key)
            keys.append(key)
        return keys

    async def _send_all(self, server: OpenAiServer, output: ResultFile, errors: ResultFile) -> None:
        self._began = time.monotonic()
        lines = read_lines(self.work.input)
        try:
            async with asyncio.TaskGroup() as tasks:
                shown = tasks.create_task(self._show())
                async with asyncio.TaskGroup() as senders:
                    for _ in range(min(self.work.concurrency, self.counts.left)):
                        senders.create_task(self._sender(server, lines, output, errors))
                shown.cancel()
        except ExceptionGroup as group:
            raise _first(group) from None

    async def _sender(
        self, server: OpenAiServer, lines: Iterator[BatchLine], output: ResultFile, errors: ResultFile
    ) -> None:
        """Sends one request after the other, of those that all senders share."""
        for line in lines:
            if line.key not in self._waiting:
                if line.number % SKIPPED_AT_ONCE == 0:
                    await asyncio.sleep(0)
                continue
            result = await answer_to(server, line, self.work.patience)
            (output if result.ok else errors).append(result.line)
            self.counts.done += result.ok
            self.counts.failed += not result.ok
            self.counts.output_tokens += result.output_tokens

    async def _show(self) -> None:
        while True:
            await asyncio.sleep(SHOW_EVERY_S)
            self._progress(self.state())

    def state(self) -> str:
        """Returns one line: what is done, the rate of this run, and the time that the rest takes at this rate."""
        counts, seconds = self.counts, time.monotonic() - self._began
        rate = (counts.done + counts.failed - counts.earlier) / seconds if seconds > 0 else 0.0
        rest = f"; {_duration(counts.left / rate)} left" if rate and counts.left else ""
        return f"{counts.done} done, {counts.failed} failed of {counts.total}; {rate:.1f} requests/s{rest}"


async def _check(server: OpenAiServer) -> None:
    """Raises RequestFailed if the server is not there or refuses the key. A server without /v1/models is not at fault."""
    try:
        await server.models()
    except RequestFailed as error:
        if not error.status or error.status in NOT_ALLOWED:
            raise


def _first(group: ExceptionGroup) -> Exception:
    """Returns the error that ended the run: senders that fail together do so for the same reason."""
    errors = list(group.exceptions)
    while errors:
        error = errors.pop(0)
        if isinstance(error, ExceptionGroup):
            errors += error.exceptions
        elif isinstance(error, MoietyError):
            return error
    return group


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
