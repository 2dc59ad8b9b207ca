"""Requests to a gateway over fake engines, and what the engines generate."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from moiety.client import Chunk
from moiety.testing import FakeEngine, eventually, fake_shape, fake_token
from support.gateways import Gateway, gateway_over

__all__ = ["PROMPT", "SHAPE", "Gateway", "chunks", "die_before", "expected", "gateway_over", "tokens"]

SHAPE = fake_shape(max_context=64)
PROMPT = [5, 6, 7]


def expected(max_tokens: int, prompt: list[int] = PROMPT, seed: int = 0) -> list[int]:
    """Returns the tokens that every fake engine generates."""
    return [fake_token(prompt, seed, position, SHAPE.vocabulary) for position in range(max_tokens)]


async def tokens(gateway: Gateway, max_tokens: int = 6, **options: object) -> list[int]:
    """Sends one request of PROMPT, seed 0; returns all its tokens."""
    return [token for chunk in await chunks(gateway, max_tokens=max_tokens, **options) for token in chunk.token_ids]


async def chunks(gateway: Gateway, prompt: str | list[int] = PROMPT, **options: object) -> list[Chunk]:
    """Sends one request; returns all its chunks."""
    got = []
    async for chunk in gateway.client.generate(prompt, **{"seed": 0, **options}):  # type: ignore[arg-type]
        gateway.received += len(chunk.token_ids)
        got.append(chunk)
    return got


def die_before(gateway: Gateway, position: int, *routers: FakeEngine, choices: int = 1) -> None:
    """Makes the first of `routers` that reaches token `position` vanish instead of generating it; the others go on.

    It vanishes once the client has all earlier tokens: tokens on their way when a router dies may or may not arrive.
    """
    vanishing: list[asyncio.Task[None]] = []

    async def vanish(router: FakeEngine) -> None:
        await eventually(lambda: gateway.received >= choices * position)
        await router.vanish()

    def kill(router: FakeEngine) -> Callable[[int], Awaitable[None]]:
        async def before_token(at: int) -> None:
            if at == position and not vanishing:
                vanishing.append(asyncio.create_task(vanish(router)))
                await asyncio.Event().wait()

        return before_token

    for router in routers:
        router.before_token = kill(router)
