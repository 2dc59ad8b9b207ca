"""Sends the requests of one run: at their times of arrival, or a fixed number at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing

from moiety.bench.load.own_delay import OwnDelayMeter
from moiety.bench.load.prompts import Plan, Planned
from moiety.bench.load.record import Record
from moiety.bench.load.report import LoadReport, report_of
from moiety.bench.load.work import LoadWork
from moiety.client.http.server import OpenAiServer, RequestFailed, allow_connections
from moiety.errors import Unavailable

Show = Callable[[str], None]
SHOW_EVERY_S = 5.0


class LoadRun:
    """One run against one server. `report` may be called at any time, also after `run` was cancelled."""

    def __init__(self, work: LoadWork, api_key: str | None = None, *, progress: Show = lambda _: None) -> None:
        self.work = work
        self.model = work.model or ""
        self._api_key, self._progress = api_key, progress
        self._records: list[Record] = []
        self._in_flight = self._peak = self._not_sent = 0
        self._began = self._ended = 0.0
        self._last_due: float | None = None  # of an open loop
        self._meter = OwnDelayMeter()

    async def run(self) -> None:
        """Sends everything and waits for all answers.

        Raises InvalidRequest for a file or a number that cannot be used, RequestFailed where the server cannot be used,
        NotFound for a model that it does not serve, Unavailable where a warm-up request fails.
        """
        work = self.work
        allow_connections(max(work.concurrency or work.max_in_flight, work.warmup))
        async with OpenAiServer(work.url, api_key=self._api_key, timeout_s=work.timeout_s) as server:
            self.model = await server.model(work.model)
            plan = await asyncio.to_thread(Plan, work, self.model)
            await self._warm_up(server, plan)
            self._progress(f"measure: model {self.model} at {server.url}{work.path}")
            self._began = time.monotonic()
            self._meter.start()
            async with asyncio.TaskGroup() as background:
                watching = [background.create_task(self._meter.watch()), background.create_task(self._show())]
                await (self._closed(server, plan) if work.concurrency else self._open(server, plan))
                self._ended = time.monotonic()
                for task in watching:
                    task.cancel()

    def report(self) -> LoadReport | None:
        """Returns the report of what has been measured so far; None if no request has been sent."""
        if not self._records:
            return None
        until = self._ended or time.monotonic()
        late = None if self.work.concurrency else [record.sent - record.due for record in self._records if record.sent]
        return report_of(
            self.work.goodput,
            self._records,
            began=self._began,
            until=until,
            last_due=self._last_due,
            not_sent=self._not_sent,
            peak_in_flight=self._peak,
            own_delay=self._meter.read(late),
        )

    async def _warm_up(self, server: OpenAiServer, plan: Plan) -> None:
        """Sends the warm-up requests. Raises Unavailable if one fails: then the measurement would show nothing else."""
        if self.work.warmup:
            self._progress(f"warm up: {self.work.warmup} request(s)")
        records = [(Record(time.monotonic()), planned) for planned in plan.warmup()]
        await asyncio.gather(*(self._send(server, record, planned) for record, planned in records))
        for record, _ in records:
            if record.failure is not None:
                raise Unavailable(
                    f"warm-up request to {server.url}{self.work.path}: {record.failure}: {record.message}"
                )
        self._peak = 0

    async def _open(self, server: OpenAiServer, plan: Plan) -> None:
        async with asyncio.TaskGroup() as requests:
            for planned in plan.requests():
                due = self._last_due = self._began + planned.at_s
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                if self._in_flight >= self.work.max_in_flight:
                    self._not_sent += 1
                    continue
                record = Record(due)
                self._records.append(record)
                requests.create_task(self._send(server, record, planned))

    async def _closed(self, server: OpenAiServer, plan: Plan) -> None:
        until = None if self.work.seconds is None else self._began + self.work.seconds
        requests = plan.requests()
        async with asyncio.TaskGroup() as clients:
            for _ in range(self.work.concurrency or 1):
                clients.create_task(self._client(server, requests, until))

    async def _client(self, server: OpenAiServer, requests: Iterator[Planned], until: float | None) -> None:
        """Sends one request after the other, of those that all clients share."""
        while until is None or time.monotonic() < until:
            planned = next(requests, None)
            if planned is None:
                return
            record = Record(time.monotonic())
            self._records.append(record)
            await self._send(server, record, planned)

    async def _send(self, server: OpenAiServer, record: Record, planned: Planned) -> None:
        self._in_flight += 1
        self._peak = max(self._peak, self._in_flight)
        record.sent = time.monotonic()
        try:
            async with aclosing(server.stream(self.work.path, planned.body)) as events:
                async for event in events:
                    record.read(event)
            record.end(time.monotonic())
        except RequestFailed as error:
            record.fail(time.monotonic(), error)
        finally:
            self._in_flight -= 1

    async def _show(self) -> None:
        """Shows every few seconds what has been sent and answered."""
        while True:
            await asyncio.sleep(SHOW_EVERY_S)
            ok = sum(record.ok for record in self._records)
            failed = sum(record.failure is not None for record in self._records)
            self._progress(f"{len(self._records)} sent, {ok} ok, {failed} failed, {self._in_flight} in flight")
