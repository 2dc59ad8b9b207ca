"""`moiety bench serve`: measures the whole served system and its peers, in turns, on the same checkpoints and prompts."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch

from moiety.bench.checkpoints import model_folder, model_name
from moiety.bench.serve.floor import StepCost
from moiety.bench.serve.peer_processes import PeerKind
from moiety.bench.serve.rows import Cell, Measured, ServeRow, row_lines, rows_of
from moiety.bench.serve.systems import PeerSystem, Served, System, SystemLoad
from moiety.bench.token_speeds import speeds
from moiety.config.run_folder import scratch_folder
from moiety.core.experts import ModelShape
from moiety.errors import ConfigError, MoietyError
from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.experts.cached import expert_layout
from moiety.tools.machine_speed import MachineSpeed, measure_speed
from moiety.wire.codec import DTYPE_NAMES, torch_dtype

WARM_UP_TOKENS = 4
START_S = 600.0  # longest start of a system; vLLM compiles while it starts
RUN_S = 300.0  # longest run of a system
INT8_WIDTH = 1.0  # bytes per parameter

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Workload:
    """The workload that every system gets."""

    models: tuple[str, ...]  # names of checkpoints.SYNTHETIC, or checkpoint folders
    groups: int
    prompts: tuple[int, ...]  # tokens per prompt
    concurrency: tuple[int, ...]  # streams at once
    new_tokens: int  # at least 2
    dtype: str
    rounds: int
    minutes: float  # no run begins after that
    int8: bool = False  # whether to also measure Moiety with int8 experts


@dataclass(frozen=True, slots=True)
class ServeReport:
    """All rows, the workload, and the machine's speed."""

    workload: Workload
    speed: MachineSpeed
    rows: tuple[ServeRow, ...]
    idle_share: Mapping[str, float] = field(default_factory=dict)  # system -> cores that it uses while it is idle


async def bench_serve(
    workload: Workload, peers: Sequence[PeerKind], *, progress: Progress = lambda _: None
) -> ServeReport:
    """Measures all systems on one model after another. If a system fails, its rows say why; the other systems go on.

    Raises CheckpointError where a checkpoint cannot be served, ConfigError where it does not suit the workload.
    """
    deadline = time.monotonic() + 60 * workload.minutes
    rows: list[ServeRow] = []
    idle: dict[str, float] = {}
    with scratch_folder() as folder:
        subjects = [
            await asyncio.to_thread(_Subject.open, model, folder, workload, progress) for model in workload.models
        ]
        progress("machine: measuring how fast it reads and multiplies")
        speed = await asyncio.to_thread(measure_speed)
        for done, subject in enumerate(subjects):
            share = (deadline - time.monotonic()) / (len(subjects) - done)
            comparison = _Comparison(workload, subject, time.monotonic() + share, progress)
            measured = await comparison.measure(peers, Path(folder) / f"peers-{done}")
            rows += rows_of(subject.name, subject.cost, speed, subject.dtype, measured)
            idle |= comparison.idle_share
    return ServeReport(workload, speed, tuple(rows), idle)


def serve_lines(report: ServeReport) -> Iterator[str]:
    """Yields the lines of the report: the tables, the workload, the machine's speeds, and Moiety's use of a core while idle."""
    workload, speed = report.workload, report.speed
    yield from row_lines(report.rows)
    yield (
        f"{workload.dtype}, {workload.new_tokens} new tokens; times in ms; medians of {workload.rounds} rounds in turns; "
        f"ratio = tokens/s over the best peer's; moiety is served by {workload.groups} expert groups"
    )
    yield (
        f"floor = weights of a step / {speed.read_bytes_per_s / 1e9:.1f} GB/s + its products / "
        f"{speed.bfloat16_flops / 1e9:.0f} GFLOP/s in bfloat16, {speed.float32_flops / 1e9:.0f} in float32, as measured; "
        "a step whose weights fit into the caches can be faster"
    )
    for name, share in report.idle_share.items():
        yield f"{name} used {100 * share:.1f} % of a core while idle; every peer was stopped (SIGSTOP) between its turns"


@dataclass(frozen=True, slots=True)
class _Subject:
    """One model, checked against the workload before any system starts."""

    name: str
    folder: Path
    shape: ModelShape
    dtype: str
    cost: StepCost

    @classmethod
    def open(cls, model: str, parent: Path, workload: Workload, progress: Progress) -> _Subject:
        context = max(workload.prompts) + workload.new_tokens
        folder = model_folder(model, parent, workload.dtype, context, progress)
        checkpoint = Checkpoint.open(folder)
        layout = expert_layout(checkpoint)
        if context > layout.shape.max_context:
            tokens = f"{max(workload.prompts)} + {workload.new_tokens}"
            raise ConfigError("prompt + new", tokens, f"at most {layout.shape.max_context}, the model's context")
        dtype = DTYPE_NAMES[torch_dtype(workload.dtype, layout.shape.dtype)]
        return cls(model_name(model), folder, layout.shape, dtype, StepCost.of(checkpoint, layout))


class _Comparison:
    """Measures all systems on one model."""

    def __init__(self, workload: Workload, subject: _Subject, until: float, progress: Progress):
        self._workload, self._subject, self._until, self._progress = workload, subject, until, progress
        self.idle_share: dict[str, float] = {}

    async def measure(self, peers: Sequence[PeerKind], scratch: Path) -> list[Measured]:
        """Starts every system, measures them in turns in every cell, and stops them. Returns the runs of each system."""
        workload = self._workload
        systems: list[System] = [Served(workload.groups)]
        if workload.int8:
            systems.append(Served(workload.groups, name="moiety int8", expert={"weights": "int8"}, width=INT8_WIDTH))
        systems += [PeerSystem(kind, scratch / kind.module) for kind in peers]
        async with AsyncExitStack() as stack:
            measured = []
            for system in systems:
                stack.push_async_callback(system.stop)
                measured.append(await self._start(system))
            for turn in range(workload.rounds):
                for tokens in workload.prompts:
                    for streams in workload.concurrency:
                        for one in measured:
                            await self._turn(one, turn, Cell(tokens, streams))
            self._progress("stop: ending the processes")
        return measured

    async def _start(self, system: System) -> Measured:
        self._progress(f"start: {system.name}")
        workload, one = self._workload, Measured(system)
        context = max(workload.prompts) + workload.new_tokens
        load = SystemLoad(str(self._subject.folder), self._subject.dtype, max(workload.concurrency), context)
        try:
            await system.start(load, START_S)
            if isinstance(system, Served) and (share := await system.idle_share()) is not None:
                self.idle_share[system.name] = share
        except MoietyError as error:
            await self._fail(one, error)
        return one

    async def _turn(self, one: Measured, turn: int, cell: Cell) -> None:
        if one.failed is not None or time.monotonic() > self._until:
            return
        stage = f"{one.system.name}, {cell.streams} streams of {cell.prompt_tokens}"
        try:
            if turn == 0:
                self._progress(f"warm up: {stage}")
                warm = self._prompts(cell, "warm")
                await one.system.run(warm, min(WARM_UP_TOKENS, self._workload.new_tokens), RUN_S)
            self._progress(f"round {turn + 1} of {self._workload.rounds}: {stage}")
            began, arrivals = await one.system.run(self._prompts(cell, turn), self._workload.new_tokens, RUN_S)
            one.runs.setdefault(cell, []).append(speeds(began, arrivals, cell.prompt_tokens))
        except MoietyError as error:
            await self._fail(one, error)

    async def _fail(self, one: Measured, error: MoietyError) -> None:
        one.failed = str(error)
        self._progress(f"FAILED: {one.system.name}: {error}")
        await one.system.stop()

    def _prompts(self, cell: Cell, turn: int | str) -> list[list[int]]:
        """Returns a turn's prompts, the same for every system. Each turn has new prompts, so that no prefix is cached."""
        seed = zlib.crc32(f"{cell.prompt_tokens}/{cell.streams}/{turn}".encode())
        generator = torch.Generator().manual_seed(seed)
        shape = (cell.streams, cell.prompt_tokens)
        return torch.randint(3, self._subject.shape.vocabulary, shape, generator=generator).tolist()
