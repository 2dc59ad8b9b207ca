"""Thousands of mutated HTTP requests: the server lives, keeps its memory, frees every place, and has no fault of its own."""

from __future__ import annotations

import asyncio
import gc
import json
import re
from pathlib import Path
from random import Random
from typing import Any

import pytest
from fuzz_support import damaged

from moiety.testing import FakeEngine, eventually, fake_shape
from support.doors import ChatDoor, Door

REQUESTS = 5000
ANSWER_S = 20.0
GROWTH_MIB = 128
MESSAGES: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
TOOLS: list[Any] = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
BODIES: list[tuple[str, dict[str, Any]]] = [
    (
        "/v1/completions",
        {
            "model": "fake",
            "prompt": "hello",
            "max_tokens": 3,
            "n": 2,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 5,
            "min_p": 0.1,
            "seed": 5,
            "stop": ["a"],
            "logprobs": 2,
            "echo": True,
            "logit_bias": {"5": 1},
            "stream": True,
            "stream_options": {"include_usage": True},
            "user": "me",
            "stop_token_ids": [7],
        },
    ),
    (
        "/v1/chat/completions",
        {
            "model": "fake",
            "messages": MESSAGES,
            "max_completion_tokens": 3,
            "tools": TOOLS,
            "tool_choice": "auto",
            "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}},
            "logprobs": True,
            "top_logprobs": 2,
            "presence_penalty": 0.5,
            "chat_template_kwargs": {"enable_thinking": False},
            "stream": False,
        },
    ),
    ("/v1/completions", {"prompt": [[5, 6], [7]], "max_tokens": 2, "guided_regex": "a+", "return_token_ids": True}),
    ("/tokenize", {"prompt": "hello", "return_token_strs": True}),
    ("/tokenize", {"messages": MESSAGES, "tools": TOOLS}),
    ("/detokenize", {"tokens": [5, 6, 7]}),
]
VALUES: list[Any] = [
    None,
    True,
    "",
    "a" * 5000,
    "\u0000\u2028\ufffd",
    0,
    -1,
    2**31,
    2**64,
    10**400,
    -(10**30),
    1e308,
    5e-324,
    0.5,
    [],
    {},
    [[]],
    [None],
    [1, "a", {}],
    {"type": "function", "function": {"name": "f"}},
    {"role": "tool"},
    [{"role": "user", "content": [{"type": "text", "text": {}}]}],
    [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
    [0] * 3000,
    list(range(70)),
    {"a": {"b": {"c": {}}}},
    "required",
]
RAW = [
    b"NaN",
    b"Infinity",
    b"1e999",
    b'"\\ud800"',
    b'"\\u0000"',
    b"[" * 300,
    b'{"a":' * 300,
    b"9" * 5000,
    b"-",
    b"\xff",
]


def mutated(random: Random, body: dict[str, Any]) -> bytes:
    """Returns the JSON of `body` with some fields changed, removed, repeated, or its bytes damaged."""
    changed = dict(body)
    for _ in range(random.randrange(4)):
        name = random.choice([*changed, "unknown", "best_of", "suffix", "structured_outputs", "min_tokens", "priority"])
        match random.randrange(4):
            case 0:
                changed.pop(name, None)
            case 1:
                nested = changed.get(name)
                if isinstance(nested, dict) and nested:
                    changed[name] = {**nested, random.choice([*nested]): random.choice(VALUES)}
                elif isinstance(nested, list) and nested:
                    place = random.randrange(len(nested))
                    changed[name] = [*nested[:place], random.choice(VALUES), *nested[place + 1 :]]
            case _:
                changed[name] = random.choice(VALUES)
    text = json.dumps(changed, ensure_ascii=random.random() < 0.5).encode()
    if random.random() < 0.2:
        name = random.choice([*body]).encode()
        text = b'{"%s":%s,%s' % (name, random.choice(RAW), text[1:])
    return damaged(random, text) if random.random() < 0.2 else text


def request(random: Random) -> tuple[bytes, bool]:
    """Returns the bytes of a request, sometimes with a wrong length, path or head, or in chunks that are none.

    Also returns whether a server knows where it ends.
    """
    path, body = random.choice(BODIES)
    content = mutated(random, body)
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Type: application/json\r\n".encode()
    length = len(content)
    match random.randrange(12):
        case 0:
            chunk = b"%x\r\n%s\r\n0\r\n\r\n" % (length, content)
            broken = random.random() < 0.5
            return head + b"Transfer-Encoding: chunked\r\n\r\n" + (
                damaged(random, chunk) if broken else chunk
            ), not broken
        case 1:
            wrong = random.choice([0, length // 2, length + 5, 1 << 40])
            return head + b"Content-Length: %d\r\n\r\n" % wrong + content, wrong <= length
        case 2:
            return damaged(random, head + b"\r\n") + content, False
        case 3:
            head = head.replace(
                path.encode(), random.choice([b"/", b"/v1/%ff", b"/v1/models/a%00b", b"/" + b"a" * 9000])
            )
        case 4:
            head += b"X-Request-Id: %s\r\n" % damaged(random, b"abc").replace(b"\n", b"").replace(b"\r", b"")
    return head + b"Content-Length: %d\r\n\r\n" % length + content, True


async def status_of(door: Door, data: bytes, ends: bool, random: Random) -> int:
    """Sends the bytes on a connection of their own; returns the answer's status, 0 where the server hung up without one."""
    host, _, port = door.url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(data)
        if random.random() < 0.1:
            return 0  # the client leaves at once
        if not ends:
            writer.write_eof()
        async with asyncio.timeout(ANSWER_S):
            answer = await reader.read()
        found = re.match(rb"HTTP/1.1 (\d{3}) ", answer)
        assert b"internal error" not in answer, answer[:500]
        return int(found[1]) if found is not None else 0
    except ConnectionError:
        return 0
    finally:
        writer.close()


def rss_mib() -> int:
    """Returns the resident memory of this process."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) >> 10


@pytest.mark.timeout(600)
async def test_mutated_requests_harm_nothing(chat_door: ChatDoor, caplog: pytest.LogCaptureFixture) -> None:
    """No answer is a fault of the server, every place is free afterwards, and a valid request gives the same as before."""
    router, random = FakeEngine("a", fake_shape(max_context=256)), Random(15)
    statuses: dict[int, int] = {}
    valid = {"prompt": "hello", "max_tokens": 8, "seed": 1, "temperature": 0}
    async with chat_door(router, within_s=500.0) as door:
        text = (await door.post("/v1/completions", **valid))["choices"][0]["text"]
        await batch(door, random, 100, statuses)
        before = rss_mib()
        for _ in range(REQUESTS // 100):
            await batch(door, random, 100, statuses)
        await eventually(lambda: door.gateway.core.running == 0, within_s=ANSWER_S)
        assert (await door.post("/v1/completions", **valid))["choices"][0]["text"] == text
    gc.collect()
    growth = rss_mib() - before
    print(
        f"fuzzed HTTP with {sum(statuses.values())} requests: {sorted(statuses.items())}; memory grew by {growth} MiB"
    )
    assert set(statuses) <= {0, 200, 400, 404, 405, 413, 415, 429}
    assert statuses[200] > REQUESTS / 20
    assert statuses[400] > REQUESTS / 20
    assert growth <= GROWTH_MIB
    assert "failed by an unexpected error" not in caplog.text


async def batch(door: Door, random: Random, count: int, statuses: dict[int, int]) -> None:
    """Sends mutated requests, eight at a time; counts the statuses."""
    for _ in range(0, count, 8):
        many = [request(random) for _ in range(8)]
        for status in await asyncio.gather(*(status_of(door, *each, random) for each in many)):
            statuses[status] = statuses.get(status, 0) + 1
