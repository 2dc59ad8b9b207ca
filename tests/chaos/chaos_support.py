"""The streams under which faults and changes happen, and their tokens."""

from __future__ import annotations

from moiety.client import Client
from support.streams import Streams

NEW_TOKENS = 80
STRIKE_AT = 20  # tokens that every stream has when the fault or change happens
SHORT = 16  # tokens of a stream that nothing happens to


async def assert_serves_on(client: Client, expected: list[list[int]]) -> None:
    """Asserts that new streams get the first tokens of `expected`."""
    assert await Streams(client, SHORT).finish() == [tokens[:SHORT] for tokens in expected]
