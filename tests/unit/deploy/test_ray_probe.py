"""`--ray-address` to something that is no Ray: one sentence within seconds. A Ray that answers is met in tests/e2e."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Iterator

import pytest

from moiety.deploy.ray_probe import check_ray
from moiety.errors import FailedPrecondition


class _NotARay(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.request.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")


@pytest.fixture
def other_program() -> Iterator[str]:
    """The address of a program that speaks HTTP/1."""
    with socketserver.TCPServer(("127.0.0.1", 0), _NotARay) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_another_program(other_program: str) -> None:
    """A program that is no Ray is refused by its address."""
    with pytest.raises(FailedPrecondition, match=f"--ray-address {other_program}: no Ray answers at"):
        check_ray(other_program)


def test_nobody(unused_tcp_port: int) -> None:
    """An address where nobody listens is refused, with what to do instead."""
    with pytest.raises(FailedPrecondition, match="must be host:port of a running head"):
        check_ray(f"127.0.0.1:{unused_tcp_port}")


@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "nonsense", "127.0.0.1"])
def test_no_address(address: str) -> None:
    """What is no address is refused with what an address looks like."""
    with pytest.raises(FailedPrecondition, match=f"--ray-address {address}: must be auto,? or host:port of "):
        check_ray(address)
