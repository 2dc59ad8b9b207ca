"""The systems that `moiety bench serve` measures, behind one protocol: Moiety as its clients see it, and peers."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from moiety.bench.serve.peer_processes import Peer, PeerKind
from moiety.client import Client
from moiety.errors import Unavailable
from moiety.local.cluster import LocalCluster
from moiety.tools.machine import cpu_seconds
from moiety_kernels.threads import usable_cores

Arrivals = tuple[float, list[list[float]]]  # (start, each prompt's token times), seconds on one clock
IDLE_S = 1.0  # how long to measure the processor time of an idle system


@dataclass(frozen=True, slots=True)
class SystemLoad:
    """The model, and the largest workload that a system must handle."""

    checkpoint: str
    dtype: str
    slots: int  # most streams at once
    context: int  # most tokens of a stream


class System(Protocol):
    """The interface of a system that `moiety bench serve` measures. Only one system runs at a time."""

    name: str

    @property
    def peer(self) -> bool:
        """Whether this system is a peer: Moiety is compared with it."""
        ...

    @property
    def expert_width(self) -> float | None:
        """Bytes per expert parameter; None = the width of the workload's dtype."""
        ...

    async def start(self, load: SystemLoad, timeout_s: float) -> None:
        """Starts the system and leaves it idle. Raises a MoietyError with the reason if the system does not start."""
        ...

    async def run(self, prompts: Sequence[Sequence[int]], new_tokens: int, timeout_s: float) -> Arrivals:
        """Generates `new_tokens` tokens greedily for each of the equally long prompts, all at once.

        Raises a MoietyError if the system fails.
        """
        ...

    async def stop(self) -> None:
        """Stops the system and leaves nothing behind. May be called in any state, also after a failed start."""
        ...


class Served:
    """Moiety as a System: gateway, router and expert groups on this machine, measured by a client of the gateway."""

    peer = False

    def __init__(
        self, groups: int, *, name: str = "moiety", expert: Mapping[str, Any] | None = None, width: float | None = None
    ):
        self.name, self.expert_width = name, width
        self._groups, self._expert = groups, expert or {}
        self._ends = AsyncExitStack()
        self._cluster: LocalCluster | None = None
        self._client: Client | None = None

    async def start(self, load: SystemLoad, timeout_s: float) -> None:
        cores = usable_cores()
        self._cluster = LocalCluster(
            load.checkpoint,
            groups=self._groups,
            dtype=load.dtype,
            router={"slots": load.slots, "queue_limit": load.slots},
            expert={"threads": max(1, cores // self._groups), **self._expert},
            pin=True,
        )
        try:
            async with asyncio.timeout(timeout_s):
                await self._ends.enter_async_context(self._cluster)
        except TimeoutError:
            raise Unavailable(f"not ready within {timeout_s:.0f} s") from None
        self._client = await self._ends.enter_async_context(Client(self._cluster.address))

    async def run(self, prompts: Sequence[Sequence[int]], new_tokens: int, timeout_s: float) -> Arrivals:
        began = time.perf_counter()
        streams = (self._stream(prompt, new_tokens, timeout_s) for prompt in prompts)
        return began, list(await asyncio.gather(*streams))

    async def _stream(self, prompt: Sequence[int], new_tokens: int, timeout_s: float) -> list[float]:
        assert self._client is not None
        times: list[float] = []
        async for chunk in self._client.generate(prompt, max_tokens=new_tokens, ignore_eos=True, timeout_s=timeout_s):
            times += [time.perf_counter()] * len(chunk.token_ids)
        return times

    async def idle_share(self) -> float | None:
        """Returns the CPU seconds per second that Moiety's processes use while idle; None where they cannot be read."""
        assert self._cluster is not None
        before = [cpu_seconds(child.pid) for child in self._cluster.children]
        await asyncio.sleep(IDLE_S)
        after = [cpu_seconds(child.pid) for child in self._cluster.children]
        spent = [end - start for start, end in zip(before, after, strict=True) if start is not None and end is not None]
        return sum(spent) / IDLE_S if spent else None

    async def stop(self) -> None:
        await self._ends.aclose()


class PeerSystem:
    """A peer as a System: it runs in its own process."""

    peer = True
    expert_width: float | None = None

    def __init__(self, kind: PeerKind, scratch: Path):
        self._peer = Peer(kind, scratch)
        self.name = kind.name

    async def start(self, load: SystemLoad, timeout_s: float) -> None:
        await self._peer.start({**asdict(load), "threads": usable_cores()}, timeout_s)
        self.name = self._peer.name

    async def run(self, prompts: Sequence[Sequence[int]], new_tokens: int, timeout_s: float) -> Arrivals:
        return await self._peer.run(prompts, new_tokens, timeout_s)

    async def stop(self) -> None:
        await self._peer.stop()


def peer_kinds(*, continuous: bool, vllm: str | None, llama_cpp: str | None) -> tuple[PeerKind, ...]:
    """Returns the peers to measure: transformers' `generate`, and the others that the arguments select.

    `continuous` adds transformers' continuous batching. `vllm` adds vLLM, and `llama_cpp` adds llama.cpp: each is the path
    of a Python interpreter that can import the system.
    """
    environment = {"HF_HUB_OFFLINE": "1", "THP_MEM_ALLOC_ENABLE": "1"}
    kinds = [PeerKind("transformers generate", "hf_generate", sys.executable, environment)]
    if continuous:
        kinds.append(PeerKind("transformers continuous batching", "hf_continuous", sys.executable, environment))
    if vllm is not None:
        kinds.append(PeerKind("vLLM CPU", "vllm_cpu", vllm, environment))
    if llama_cpp is not None:
        kinds.append(PeerKind("llama.cpp", "llama_cpp_batch", llama_cpp, {}))
    return tuple(kinds)
