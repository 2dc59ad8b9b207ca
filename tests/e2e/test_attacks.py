"""Requests that cost far more than they look: refused or bounded, while the streams of others go on with the same tokens."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from moiety.client import Client
from moiety.errors import DeadlineExceeded, InvalidRequest, MoietyError, ResourceExhausted
from support.serving import Served
from support.streams import PROMPTS, Streams

LONGEST_GAP_S = 2.0  # ten times the worst gap that was measured on an idle machine
GREEDY_GUIDES = [
    f"([{a}-z]{{1000}}){{{n}}}" if n % 2 else f"({a}{{1000}}){{{n}}}" for n, a in enumerate("abcdefghij", 990)
]


def memory(pid: int) -> int:
    """Returns the bytes of memory that a process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * 4096


async def outcome(client: Client, prompt: str | list[int], timeout_s: float, **options: object) -> MoietyError | None:
    """Sends one request; returns its error, or None if it has ended well."""
    try:
        async for _ in client.generate(prompt, timeout_s=timeout_s, **options):  # type: ignore[arg-type]
            pass
    except MoietyError as error:
        return error
    return None


@pytest.mark.slow
def test_costly_requests_disturb_nobody(served: Served) -> None:
    """Guides, texts and names that cost much neither stall nor change the streams of others, and leave no memory behind.

    Takes some 10 s.
    """

    async def scenario(client: Client) -> None:
        new_tokens, prompts = 150, PROMPTS[:3]
        expected = await Streams(client, new_tokens, prompts).finish()
        pids = [served.cluster.router().pid, *(c.pid for c in served.cluster.replicas("gateway"))]
        before = sum(map(memory, pids))
        streams = Streams(client, new_tokens, prompts)
        await streams.wait_for_tokens(3)
        guided = [outcome(client, [5, 6], 60.0, max_tokens=20, temperature=1.0, regex=guide) for guide in GREEDY_GUIDES]
        hanging = outcome(
            client, [5, 6], 60.0, max_tokens=20, json_schema='{"type": "integer", "multipleOf": 99999989}'
        )
        texts = [outcome(client, "word " * 400_000, 0.5, max_tokens=1) for _ in range(8)]
        names = [outcome(client, [5, 6], 60.0, max_tokens=2, tenant=f"name {n}", retries=100) for n in range(100)]
        results = await asyncio.gather(*guided, hanging, *texts, *names)
        assert all(result is None for result in results[: len(guided)]), results
        hung = results[len(guided)]  # on a busy machine the wait for the other guides ends it first
        assert isinstance(hung, InvalidRequest | ResourceExhausted), hung
        refused = (InvalidRequest, DeadlineExceeded, ResourceExhausted)
        assert all(isinstance(result, refused) for result in results[len(guided) + 1 : len(guided) + 9]), results
        assert all(result is None for result in results[len(guided) + 9 :]), results
        assert await streams.finish() == expected
        assert streams.worst_gap < LONGEST_GAP_S
        assert sum(map(memory, pids)) - before < 400 << 20

    served.run(scenario)
