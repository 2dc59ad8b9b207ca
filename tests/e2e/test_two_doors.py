"""Both doors of one system: gRPC and the OpenAI HTTP API, with one core behind them."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from moiety.client import Client
from moiety.local.cluster import LocalCluster
from support.serving import Served


def _request(address: str, body: dict[str, Any]) -> urllib.request.Request:
    """Returns a request for completions at the HTTP API at `address`."""
    data = json.dumps(body).encode()
    return urllib.request.Request(f"http://{address}/v1/completions", data, {"content-type": "application/json"})


async def _answer(request: urllib.request.Request | str) -> dict[str, Any]:
    """Returns what the HTTP API answers."""

    def read() -> dict[str, Any]:
        with urllib.request.urlopen(request, timeout=30) as answer:
            value: dict[str, Any] = json.load(answer)
            return value

    return await asyncio.to_thread(read)


def test_both_doors_give_the_same_text(served: Served) -> None:
    """One prompt gets the same text and the same counts over gRPC and over HTTP."""

    async def scenario(client: Client) -> None:
        (model,) = await client.models()
        chunks = [chunk async for chunk in client.generate("Each expert", max_tokens=12, ignore_eos=True)]
        asked = {
            "model": model.name,
            "prompt": "Each expert",
            "max_tokens": 12,
            "temperature": 0,
            "ignore_eos": True,
        }
        answer = await _answer(_request(served.cluster.http_address, asked))
        assert answer["choices"][0]["text"] == "".join(chunk.text for chunk in chunks)
        assert answer["usage"]["completion_tokens"] == 12
        listed = await _answer(f"http://{served.cluster.http_address}/v1/models")
        assert [one["id"] for one in listed["data"]] == [model.name]

    served.run(scenario)


async def test_a_gateway_that_drains_finishes_http_requests(tiny: Callable[[str], str]) -> None:
    """A request over HTTP that runs while its gateway drains gets its whole answer, and no process is left behind.

    Over 20 s on two cores: four processes start.
    """
    async with LocalCluster(tiny("mixtral"), dtype="float32") as cluster:
        processes = [psutil.Process(child.pid) for child in cluster.children]
        (gateway,) = cluster.replicas("gateway")
        asked = {
            "model": Path(cluster.model).name,
            "prompt": "Each",
            "max_tokens": 300,
            "ignore_eos": True,
            "stream": True,
        }
        answer = await asyncio.to_thread(urllib.request.urlopen, _request(cluster.http_address, asked), timeout=60)
        with answer:
            lines = [await asyncio.to_thread(answer.readline)]
            await cluster.drain(gateway, 60.0)
            lines += await asyncio.to_thread(answer.readlines)
        events = [line for line in lines if line.startswith(b"data: ")]
        assert events[-1] == b"data: [DONE]\n"
        assert json.loads(events[-2].removeprefix(b"data: "))["choices"][0]["finish_reason"] == "length"
        assert not cluster.replicas("gateway")
    assert not [process for process in processes if process.is_running()]
