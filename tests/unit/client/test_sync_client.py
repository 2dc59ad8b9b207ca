"""The synchronous client does what the asynchronous one does, from any thread, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import inspect
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from client_support import PROMPT, Generations, serving, sync_tokens

from moiety.client import Chunk, Client, SyncClient
from moiety.errors import Cancelled, DeadlineExceeded, InvalidRequest, PeerLost, ResourceExhausted
from moiety.testing import eventually

# Reads a stream that gets stuck, or sleeps in the loop's body, until SIGINT; prints which threads are left.
INTERRUPTED = """
import sys, threading, time
from moiety.client import SyncClient

try:
    with SyncClient(sys.argv[1]) as client:
        for chunk in client.generate([5, 6, 7], max_tokens=6):
            print(chunk.token_ids[0], flush=True)
            if sys.argv[2] == "body" and chunk.token_ids[0] == 2:
                time.sleep(60)
except KeyboardInterrupt:
    until = time.monotonic() + 10
    while len(threading.enumerate()) > 1 and time.monotonic() < until:
        time.sleep(0.01)
    print([thread.name for thread in threading.enumerate()])
"""


async def test_both_clients_return_the_same():
    """Chunks and models are equal, and so are the arguments of `generate`."""
    async with serving(Generations()) as address, Client(address) as client:
        expected = (
            [chunk async for chunk in client.generate("Each expert", max_tokens=4, stop="x", seed=1)],
            await client.models(),
        )

        def work() -> object:
            with SyncClient(address) as sync:
                return list(sync.generate("Each expert", max_tokens=4, stop="x", seed=1)), sync.models()

        assert await asyncio.to_thread(work) == expected
        assert isinstance(expected[0][0], Chunk)
    assert inspect.signature(Client.generate) == inspect.signature(SyncClient.generate)


@pytest.mark.parametrize("leave", ["close", "break"])
async def test_leaving_the_stream_cancels_the_request(leave: str):
    """Closing the iterator, or leaving the loop, ends the request at the server, and the client goes on."""
    generations = Generations()
    generations.held_at = 3

    def work(client: SyncClient) -> None:
        if leave == "close":
            stream = client.generate(PROMPT, max_tokens=6)
            assert next(stream).token_ids == (0,)
            stream.close()
            return
        for _ in client.generate(PROMPT, max_tokens=6):
            break

    async with serving(generations) as address:
        with SyncClient(address) as client:
            await asyncio.to_thread(work, client)
            await eventually(lambda: (generations.asked, generations.running) == (1, 0))
            assert await asyncio.to_thread(sync_tokens, client, 3) == [0, 1, 2]


async def test_several_threads_share_a_client():
    """Requests of sixteen threads at once through one client get their own tokens, over one connection."""
    generations = Generations()
    async with serving(generations) as address:

        def work() -> list[list[int]]:
            with SyncClient(address) as client, ThreadPoolExecutor(16) as threads:
                return list(threads.map(lambda count: sync_tokens(client, count), range(1, 65)))

        assert await asyncio.to_thread(work) == [list(range(count)) for count in range(1, 65)]
        assert list(generations.peers.values()) == [64]


async def test_closing_the_client_ends_its_requests():
    """A request that waits in another thread ends with Cancelled, and no thread of the client is left."""
    generations = Generations()
    generations.held_at = 3
    async with serving(generations) as address:
        client = SyncClient(address)
        waiting = asyncio.create_task(asyncio.to_thread(sync_tokens, client, 6))
        await eventually(lambda: generations.running == 1)
        client.close()
        with pytest.raises(Cancelled):
            await waiting
        await eventually(lambda: generations.running == 0)
        await eventually(lambda: not [thread for thread in threading.enumerate() if "channel" in thread.name])


async def test_a_refused_request_is_retried():
    """A refused request is sent again after the retry delay, as often as `retries` says and within the timeout."""
    generations = Generations()
    async with serving(generations) as address:
        with SyncClient(address) as client:
            generations.refusals, began = 2, time.monotonic()
            assert await asyncio.to_thread(sync_tokens, client, 3, retries=2) == [0, 1, 2]
            assert time.monotonic() - began >= 0.4
            for options, attempts in (({}, 1), ({"retries": 1}, 2), ({"retries": 5, "timeout_s": 0.15}, 1)):
                generations.refusals, generations.asked = 10, 0
                with pytest.raises(ResourceExhausted, match="the queue is full"):
                    await asyncio.to_thread(sync_tokens, client, 3, **options)
                assert generations.asked == attempts


async def test_errors_are_those_of_the_asynchronous_client():
    """A bad argument, a timeout and a gateway that is not there raise InvalidRequest, DeadlineExceeded and PeerLost."""
    generations = Generations()
    generations.held_at = 0
    async with serving(generations) as address:
        with SyncClient(address) as client:
            with pytest.raises(InvalidRequest, match=r"sampling\.top_k"):
                client.generate(PROMPT, top_k=1 << 40)
            with pytest.raises(DeadlineExceeded):
                await asyncio.to_thread(sync_tokens, client, 3, timeout_s=0.3)
    with SyncClient(address) as client, pytest.raises(PeerLost):
        await asyncio.to_thread(client.models)


@pytest.mark.parametrize("where", ["next", "body"])
async def test_an_interrupt_leaves_no_thread(where: str):
    """Ctrl-C while the client waits for a token, or in the loop's body, ends the request and every thread of the client."""
    generations = Generations()
    generations.held_at = 3
    async with serving(generations) as address:
        line = [sys.executable, "-c", INTERRUPTED, address, where]
        child = await asyncio.create_subprocess_exec(*line, stdout=asyncio.subprocess.PIPE)
        try:
            assert child.stdout is not None
            async with asyncio.timeout(30):
                assert [await child.stdout.readline() for _ in range(3)] == [b"0\n", b"1\n", b"2\n"]
                child.send_signal(signal.SIGINT)
                assert await child.stdout.read() == b"['MainThread']\n"
                assert await child.wait() == 0
            await eventually(lambda: generations.running == 0)
        finally:
            if child.returncode is None:
                child.kill()
                await child.wait()
