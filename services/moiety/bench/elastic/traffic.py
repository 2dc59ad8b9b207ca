"""Skewed, open-loop traffic. Prompts are drawn by Zipf's law. The likeliest send the most of their rows to one group."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from moiety.client import Client
from moiety.core.replica import Role
from moiety.errors import MoietyError
from moiety.registry.interface import Registry

CANDIDATES = 10  # prompts to try; each repeats one token
PROMPT_TOKENS = 8
LEDGER_S = 1.1  # seconds between readings of the ledger; routers report their counters once a second


@dataclass(frozen=True, slots=True)
class SkewedPrompts:
    """The prompts and their probabilities. The larger the share of a prompt's rows to the hot group, the earlier it comes."""

    tokens: tuple[int, ...]  # each prompt repeats one of these PROMPT_TOKENS times; the largest share comes first
    chances: tuple[float, ...]  # probability of each prompt
    hot: str  # deployment of the hot group: the one that gets the largest shares of the first prompts' rows


class Traffic:
    """Open-loop traffic: sends requests at random times, without waiting for earlier ones."""

    def __init__(self, client: Client, prompts: SkewedPrompts, new_tokens: int, seed: int) -> None:
        self._client, self._prompts, self._new_tokens = client, prompts, new_tokens
        self._random = np.random.default_rng(seed)
        self._tasks: set[asyncio.Task[None]] = set()
        self.requests = 0
        self.running = 0
        self.failures: list[str] = []
        self.gaps: list[tuple[float, float]] = []  # (Unix seconds of a token, seconds since the token before it)

    async def offer(self, per_s: float, seconds: float) -> None:
        """Sends requests as a Poisson process for `seconds`, on average `per_s` requests per second."""
        until = time.monotonic() + seconds
        while (wait := self._random.exponential(1.0 / per_s)) < until - time.monotonic():
            await asyncio.sleep(wait)
            token = int(self._random.choice(self._prompts.tokens, p=self._prompts.chances))
            self._tasks.add(asyncio.create_task(self._request(token)))
        await asyncio.sleep(max(0.0, until - time.monotonic()))

    async def finish(self) -> None:
        """Waits until all requests have ended."""
        await asyncio.gather(*self._tasks)

    async def _request(self, token: int) -> None:
        self.requests += 1
        self.running += 1
        last, came = 0.0, 0
        try:
            stream = self._client.generate([token] * PROMPT_TOKENS, max_tokens=self._new_tokens, ignore_eos=True)
            async for chunk in stream:
                now = time.time()
                if came and chunk.token_ids:
                    self.gaps.append((now, now - last))
                last, came = now, came + len(chunk.token_ids)
            if came != self._new_tokens:
                self.failures.append(f"{came} of {self._new_tokens} tokens")
        except MoietyError as error:
            self.failures.append(f"{type(error).__name__}: {error}")
        finally:
            self.running -= 1


async def skewed_prompts(
    client: Client, registry: Registry, exponent: float, seed: int, progress: Callable[[str], None]
) -> SkewedPrompts:
    """Runs CANDIDATES prompts one by one, picks the hot group, and sorts the prompts as SkewedPrompts describes."""
    tokens = (20 + np.random.default_rng(seed).permutation(200)[:CANDIDATES]).tolist()
    shares = []  # [candidates][groups]: fraction of the candidate's rows
    groups: list[str] = []
    before = await _rows(registry)
    for token in tokens:
        async for _ in client.generate([token] * PROMPT_TOKENS, max_tokens=2, ignore_eos=True):
            pass
        after = await _moved(registry, before)
        groups = sorted(after)
        rows = [after[group] - before.get(group, 0) for group in groups]
        shares.append([count / sum(rows) for count in rows])
        before = after
    table = np.array(shares)  # [candidates, groups]
    # the group with the largest mean of its top 3 shares
    hot = int(np.argmax(np.sort(table, axis=0)[-3:].mean(axis=0)))
    order = np.argsort(-table[:, hot], kind="stable")
    chances = 1.0 / np.arange(1, len(order) + 1) ** exponent
    chances /= chances.sum()
    expected = float(table[order, hot] @ chances)
    progress(
        f"{len(order)} prompts by Zipf({exponent:g}): {groups[hot]} gets {table[order[0], hot]:.0%} of the first prompt's "
        f"rows, {expected:.0%} of all rows"
    )
    return SkewedPrompts(tuple(tokens[index] for index in order), tuple(chances.tolist()), groups[hot])


async def _moved(registry: Registry, before: dict[str, int]) -> dict[str, int]:
    """Returns the rows of each group in the load ledger, once two successive readings agree and differ from `before`.

    Readings are LEDGER_S apart, which is longer than a router's reporting period. Raises TimeoutError after 30 seconds.
    """
    last = before
    async with asyncio.timeout(30):
        while True:
            await asyncio.sleep(LEDGER_S)
            rows = await _rows(registry)
            if rows == last and rows != before:
                return rows
            last = rows


async def _rows(registry: Registry) -> dict[str, int]:
    """Returns the rows that routers have sent to each group's experts so far, from the load ledger."""
    held = {replica.deployment: replica.held for replica in await registry.replicas() if replica.role is Role.EXPERT}
    totals = dict.fromkeys(held, 0)
    for demand in (await registry.expert_demand()).values():
        for name, experts in held.items():
            totals[name] += sum(_layer_rows(demand.rows[layer], ids) for layer, ids in experts.by_layer.items())
    return totals


def _layer_rows(rows: Sequence[int], ids: frozenset[int]) -> int:
    return sum(rows[expert] for expert in ids)
