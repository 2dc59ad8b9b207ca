"""What all fakes share: names, the shape and arithmetic of a made-up model, and helpers that wait."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from moiety.core.experts import ExpertMLP, ExpertSet, ModelShape
from moiety.core.replica import Replica, Role
from moiety.core.system import SystemId
from moiety.wire.transports.mailbox import Mailbox

HOST = "127.0.0.1"
MODEL = "fake"


def fake_system(**changes: Any) -> SystemId:
    """Returns the identity of a made-up system, with `changes`."""
    return replace(SystemId("fake", "here", "0" * 32, groups=2, slices=1), **changes)


SYSTEM = fake_system()


def fake_shape(
    *, layers: int = 2, experts: int = 8, top_k: int = 2, hidden: int = 16, vocabulary: int = 320, max_context: int = 64
) -> ModelShape:
    """Returns the shape of a made-up model."""
    mlp = ExpertMLP(hidden=hidden, intermediate=2 * hidden)
    return ModelShape("fake", layers, experts, top_k, mlp, "float32", vocabulary, max_context)


def fake_expert(layer: int, expert: int, rows: torch.Tensor) -> torch.Tensor:
    """Computes a fake expert for rows [R, D]: a product and a sum, each rounded element by element.

    Unlike in a matrix product, the bits of a row do not depend on the rows beside it. So if two ways of sending the same
    rows differ in one bit, the transport is at fault.
    """
    scale, shift = 0.3 + 0.1 * expert + 0.01 * layer, 0.7 - 0.3 * expert
    return rows * scale + shift


def fake_layer(layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor) -> torch.Tensor:
    """Returns [T, K, D], what a hop over fake replicas must return for hidden [T, D] and top_k_index [T, K].

    Where an index is -1, the row is zero.
    """
    rows = [
        fake_expert(layer, int(expert), hidden[token]) if expert >= 0 else torch.zeros_like(hidden[token])
        for token, experts in enumerate(top_k_index)
        for expert in experts
    ]
    return torch.stack(rows).view(*top_k_index.shape, -1)


def fake_token(prompt: Sequence[int], seed: int, position: int, vocabulary: int, choice: int = 0) -> int:
    """Returns the token that a FakeEngine generates at `position` (from 0) of a choice."""
    philox = np.random.Philox(key=seed + sum(prompt), counter=[position, choice, 0, 0])
    return int(np.random.Generator(philox).integers(vocabulary))


def fake_replica(
    replica_id: str, role: Role, port: int, *, held: ExpertSet | None = None, system: SystemId = SYSTEM
) -> Replica:
    """Returns the registry entry of a ready service on this machine."""
    return Replica(
        id=replica_id,
        role=role,
        deployment=role.value,
        address=f"{HOST}:{port}",
        node="here",
        model=MODEL,
        revision=system.revision,
        held=held or ExpertSet(),
    )


async def eventually(condition: Callable[[], bool], within_s: float = 10.0) -> None:
    """Returns once `condition` holds; raises TimeoutError when it does not within `within_s`."""
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)


async def no_wait(_: object) -> None:
    """Does nothing. It is the default of a fake's hooks; a test may replace it by a function that waits."""


@contextmanager
def owner_of(mailbox: Mailbox) -> Iterator[None]:
    """Runs a thread that owns `mailbox` and handles what arrives there, while the block runs."""
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
