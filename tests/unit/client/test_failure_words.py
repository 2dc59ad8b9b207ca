"""What a client's error says when the gateway does not answer, or not in time."""

from __future__ import annotations

import socket
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from client_support import PROMPT, Generations, default_server

from moiety.client import Client, SyncClient
from moiety.errors import DeadlineExceeded, InvalidRequest, PeerLost
from moiety.testing import HOST


async def test_a_late_answer_is_told_with_place_time_and_tokens() -> None:
    """A deadline's error names the gateway, the call, the timeout, and how many tokens had come."""
    generations = Generations()
    generations.held_at = 2
    async with default_server(generations) as address, Client(address) as client:
        with pytest.raises(DeadlineExceeded) as late:
            async for _ in client.generate(PROMPT, max_tokens=4, timeout_s=0.5):
                pass
        told = f"gateway {address}: Generate was not done within its timeout of 0.5 s; 2 tokens had arrived"
        assert str(late.value) == told


def test_who_listens_at_a_wrong_address_is_told() -> None:
    """Nobody, a server of HTTP, one that says nothing, no such host: each has its sentence, without gRPC's own words."""
    with socket.create_server((HOST, 0)) as silent, HTTPServer((HOST, 0), BaseHTTPRequestHandler) as http:
        Thread(target=http.serve_forever, daemon=True).start()
        with socket.create_server((HOST, 0)) as closed:
            free = closed.getsockname()[1]
        told = {
            f"{HOST}:{free}": "nobody listens there (connection refused)",
            f"{HOST}:{http.server_port}": "what listens there is no gRPC server; the HTTP API has a port of its own",
            f"{HOST}:{silent.getsockname()[1]}": "connecting timed out: nothing came back",
            "no-such-host.invalid:1": "no such host name",
            "a b:1": "that is no HOST:PORT",
        }
        for address, words in told.items():
            with SyncClient(address, connect_timeout_s=1.0) as client, pytest.raises(PeerLost) as lost:
                client.models(timeout_s=20.0)
            assert str(lost.value) == f"gateway {address}: {words}"
        http.shutdown()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("caf\ud83d", "character 4 is U+D83D, one half of a surrogate pair"),
        ("caf\udce9", "character 4 is the byte 0xe9, which is not UTF-8"),
    ],
)
def test_text_that_is_no_utf8_is_refused_by_the_field(text: str, why: str) -> None:
    """Each field that takes text refuses half a character and a byte of another encoding by its own name."""
    fields = {"sampling.stop": {"stop": [text]}, "tenant": {"tenant": text}, "sampling.guide.regex": {"regex": text}}
    with SyncClient(f"{HOST}:1") as client:
        for field, options in {"prompt.text": {}, **fields}.items():
            with pytest.raises(InvalidRequest) as refused:
                client.generate("x" if options else text, **options)  # type: ignore[arg-type]
            assert str(refused.value).startswith(f"{field} = ")
            assert str(refused.value).endswith(f"must be text in UTF-8: {why}")
