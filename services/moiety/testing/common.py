"""What all fakes share: names, the shape and the arithmetic of a model that exists only as numbers, and waiting."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from moiety.core.experts import ExpertMLP, ExpertSet, ModelShape
from moiety.core.replica import Replica, Role
from moiety.wire.transports.mailbox import Mailbox

HOST = "127.0.0.1"
MODEL = "fake"
REVISION = "fake-revision"


def fake_shape(
    *, layers: int = 2, experts: int = 8, top_k: int = 2, hidden: int = 16, vocabulary: int = 320, max_context: int = 64
) -> ModelShape:
    """The shape of a model that exists only as numbers."""
    mlp = ExpertMLP(hidden=hidden, intermediate=2 * hidden)
    return ModelShape("fake", layers, experts, top_k, mlp, "float32", vocabulary, max_context)


def fake_expert(layer: int, expert: int, rows: torch.Tensor) -> torch.Tensor:
    """What fake experts compute for rows [R, D]: a product and a sum, each rounded element by element.

    No row's bits depend on the rows beside it, as they may in a matrix product, so a difference of one bit between two
    ways of sending the same rows is the transport's fault.
    """
    scale, shift = 0.3 + 0.1 * expert + 0.01 * layer, 0.7 - 0.3 * expert
    return rows * scale + shift


def fake_layer(layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor) -> torch.Tensor:
    """The naive twin of a hop over fake replicas: hidden [T, D], top_k_index [T, K] -> [T, K, D], zeros where -1."""
    rows = [
        fake_expert(layer, int(expert), hidden[token]) if expert >= 0 else torch.zeros_like(hidden[token])
        for token, experts in enumerate(top_k_index)
        for expert in experts
    ]
    return torch.stack(rows).view(*top_k_index.shape, -1)


def fake_token(prompt: Sequence[int], seed: int, position: int, vocabulary: int, choice: int = 0) -> int:
    """The token a FakeEngine generates at `position` (from 0) of a choice."""
    philox = np.random.Philox(key=seed + sum(prompt), counter=[position, choice, 0, 0])
    return int(np.random.Generator(philox).integers(vocabulary))


def fake_replica(
    replica_id: str, role: Role, port: int, *, held: ExpertSet | None = None, revision: str = REVISION
) -> Replica:
    """The registry entry of a ready service on this machine."""
    return Replica(
        id=replica_id,
        role=role,
        deployment=role.value,
        address=f"{HOST}:{port}",
        node="here",
        model=MODEL,
        revision=revision,
        held=held or ExpertSet(),
    )


async def eventually(condition: Callable[[], bool], within_s: float = 10.0) -> None:
    """Returns once `condition` holds; raises TimeoutError when it does not within `within_s`."""
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)


async def at_once(_: object) -> None:
    """Answers without ado."""


@contextmanager
def owner_of(mailbox: Mailbox) -> Iterator[None]:
    """A thread that waits at `mailbox` and does nothing else, for as long as the block runs."""
    over = threading.Event()

    def own() -> None:
        while not over.is_set():
            mailbox.wait()

    thread = threading.Thread(target=own, name="mailbox-owner")
    thread.start()
    try:
        yield
    finally:
        over.set()
        mailbox.wake()
        thread.join()
