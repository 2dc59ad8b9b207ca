"""`moiety bench flood`: offers more requests than can be served, and measures the accepted ones and the refusals."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import grpc
import torch

from moiety.bench.checkpoints import model_folder, model_name
from moiety.bench.report import percentile, table
from moiety.config.run_folder import scratch_folder
from moiety.errors import Unavailable
from moiety.local.cluster import LocalCluster
from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.experts.cached import expert_layout
from moiety.v1 import generation_pb2, generation_pb2_grpc
from moiety.wire.channels import channel
from moiety.wire.status import RETRY_AFTER_KEY

KEPT = 0.95  # fraction of the peak that accepted requests must reach at every load above 1
RAMP = 0.2  # fraction of each load's time before counting starts, so that the queue has filled
REQUEST_S = 120.0  # deadline of a request

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class FloodWork:
    """The system to serve with, and the load to offer."""

    model: str  # a name of checkpoints.SYNTHETIC, or a checkpoint folder
    groups: int
    slots: int
    queue: int
    loads: tuple[int, ...]  # requests per second, as multiples of the capacity
    seconds: float
    prompt_tokens: int
    new_tokens: int
    dtype: str
    rounds: int


@dataclass(frozen=True, slots=True)
class FloodRow:
    """Results at one load. Rates are medians of the rounds, counts are sums. Capacity runs have `load` 0."""

    model: str
    load: int
    offered_per_s: float
    accepted: int
    refused: int  # with RESOURCE_EXHAUSTED
    refused_with_hint: int  # refusals that carry a retry delay
    failed: int  # for any other reason
    tokens_per_s: float  # of accepted requests, after the ramp
    ratio_to_peak: float


@dataclass(frozen=True, slots=True)
class FloodReport:
    """The workload, and one row per load."""

    work: FloodWork
    rows: tuple[FloodRow, ...]

    @property
    def passed(self) -> bool:
        """Whether each load above 1 reached KEPT of the peak, every refusal had a retry delay, and no request failed."""
        # Only loads above 1 count: at lower loads the arrivals limit the pace.
        paced = all(row.ratio_to_peak >= KEPT for row in self.rows if row.load > 1)
        return paced and all(row.refused_with_hint == row.refused and row.failed == 0 for row in self.rows)


@dataclass(slots=True)
class Tally:
    """Counts of one run's requests by outcome, and the arrival times of their tokens."""

    accepted: int = 0
    refused: int = 0
    refused_with_hint: int = 0
    failures: list[str] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)  # of every token, seconds of the monotonic clock
    tokens_per_s: float = 0.0


async def bench_flood(work: FloodWork, *, progress: Progress = lambda _: None) -> FloodReport:
    """Measures the capacity, then every load, in each round.

    Raises CheckpointError where the model cannot be served, Unavailable where the capacity run gets no token.
    """
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(scratch_folder())
        context = work.prompt_tokens + work.new_tokens
        path = await asyncio.to_thread(model_folder, work.model, folder, work.dtype, context, progress)
        shape = (await asyncio.to_thread(expert_layout, Checkpoint.open(path))).shape
        progress(f"served: {work.slots} slots, {work.queue} places in the queue, {work.groups} expert groups")
        cluster = LocalCluster(
            path,
            groups=work.groups,
            dtype=work.dtype,
            router={"slots": work.slots, "queue_limit": work.queue},
        )
        await stack.enter_async_context(cluster)
        stack.callback(progress, "stop: ending the processes")
        flood = _Flood(await stack.enter_async_context(channel(cluster.address)), work, shape.vocabulary)
        runs: dict[int, list[Tally]] = {}
        offered: dict[int, list[float]] = {}
        for turn in range(work.rounds):
            progress(f"round {turn + 1} of {work.rounds}: capacity")
            full = await flood.closed(work.slots + work.queue // 2)
            capacity = full.tokens_per_s / work.new_tokens
            if not capacity:
                reason = full.failures[0] if full.failures else "no token arrived"
                raise Unavailable(f"nothing was served in the capacity run: {reason}")
            runs.setdefault(0, []).append(full)
            offered.setdefault(0, []).append(capacity)
            for load in work.loads:
                progress(f"round {turn + 1} of {work.rounds}: {load} x {capacity:.1f} requests/s")
                runs.setdefault(load, []).append(await flood.open(load * capacity))
                offered.setdefault(load, []).append(load * capacity)
        return FloodReport(work, rows_of(work, runs, offered))


def rows_of(work: FloodWork, runs: dict[int, list[Tally]], offered: dict[int, list[float]]) -> tuple[FloodRow, ...]:
    """Returns one row per load. The peak is the load with the best median tokens/s.

    A row's ratio to the peak is the median of the ratios in each round, because a machine's speed drifts.
    """
    pace = {load: [run.tokens_per_s for run in tallies] for load, tallies in runs.items()}
    peak = max(pace.values(), key=lambda rates: percentile(rates, 50))
    return tuple(
        FloodRow(
            model=model_name(work.model),
            load=load,
            offered_per_s=percentile(offered[load], 50),
            accepted=sum(run.accepted for run in tallies),
            refused=sum(run.refused for run in tallies),
            refused_with_hint=sum(run.refused_with_hint for run in tallies),
            failed=sum(len(run.failures) for run in tallies),
            tokens_per_s=percentile(pace[load], 50),
            ratio_to_peak=percentile([rate / best for rate, best in zip(pace[load], peak, strict=True)], 50),
        )
        for load, tallies in runs.items()
    )


def flood_lines(report: FloodReport) -> Iterator[str]:
    """Yields the lines of the report: a table with one line per load, the workload, and last the verdict."""
    header = ("load", "offered/s", "accepted", "refused", "with hint", "failed", "tok/s", "of peak")
    work = report.work
    yield model_name(work.model)
    yield from table(
        header,
        [
            (
                f"{row.load}x" if row.load else "capacity",
                f"{row.offered_per_s:.1f}",
                str(row.accepted),
                str(row.refused),
                str(row.refused_with_hint),
                str(row.failed),
                f"{row.tokens_per_s:.1f}",
                f"{row.ratio_to_peak:.3f}",
            )
            for row in report.rows
        ],
    )
    yield (
        f"{work.dtype}, {work.slots} slots and {work.queue} places in the queue, prompts of {work.prompt_tokens}, "
        f"{work.new_tokens} new tokens; {work.seconds:g} s per load, medians and sums of {work.rounds} rounds"
    )
    yield (
        f"accepted work {'kept' if report.passed else 'DID NOT keep'} {100 * KEPT:.0f} % of the peak "
        "with a retry delay on every refusal"
    )


class _Flood:
    """Sends requests to one gateway and counts their outcomes."""

    def __init__(self, channel: grpc.aio.Channel, work: FloodWork, vocabulary: int):
        self._generate = generation_pb2_grpc.GenerationServiceStub(channel).Generate
        self._work, self._vocabulary, self._count = work, vocabulary, 0

    async def closed(self, clients: int) -> Tally:
        """Runs `clients` clients at once (closed loop). Each client sends a request when its previous one has ended."""
        tally, began = Tally(), time.monotonic()

        async def client() -> None:
            while time.monotonic() < began + self._work.seconds:
                await self._request(tally)

        await asyncio.gather(*(client() for _ in range(clients)))
        return self._paced(tally, began)

    async def open(self, per_s: float) -> Tally:
        """Sends `per_s` requests per second at even intervals (open loop), without waiting for earlier ones."""
        tally, began = Tally(), time.monotonic()
        async with asyncio.TaskGroup() as requests:
            for number in range(int(per_s * self._work.seconds)):
                await asyncio.sleep(max(0.0, began + number / per_s - time.monotonic()))
                requests.create_task(self._request(tally))
        return self._paced(tally, began)

    async def _request(self, tally: Tally) -> None:
        call = self._generate(self._next_request(), timeout=REQUEST_S)
        try:
            async for response in call:
                tally.arrivals += [time.monotonic()] * len(response.token_ids)
            tally.accepted += 1
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                tally.refused += 1
                tally.refused_with_hint += any(key == RETRY_AFTER_KEY for key, _ in error.trailing_metadata() or ())
            else:
                tally.failures.append(f"{error.code().name}: {error.details()}")
        finally:
            call.cancel()

    def _next_request(self) -> generation_pb2.GenerateRequest:
        work, self._count = self._work, self._count + 1
        generator = torch.Generator().manual_seed(self._count)
        prompt: Sequence[int] = torch.randint(3, self._vocabulary, (work.prompt_tokens,), generator=generator).tolist()
        request = generation_pb2.GenerateRequest(
            sampling=generation_pb2.SamplingParams(max_tokens=work.new_tokens, ignore_eos=True)
        )
        request.token_ids.ids.extend(prompt)
        return request

    def _paced(self, tally: Tally, began: float) -> Tally:
        """Sets `tally.tokens_per_s` from the tokens between the ramp and the end of sending, and returns `tally`."""
        since, until = began + RAMP * self._work.seconds, began + self._work.seconds
        tally.tokens_per_s = sum(since <= arrival < until for arrival in tally.arrivals) / (until - since)
        return tally
