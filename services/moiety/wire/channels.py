"""Options of all gRPC channels, also those they share with servers: message size limits and how a silent peer is noticed.

Between services, links are short and every peer is ours: both ends ping twice a second. A client of the public API may be
far away, and behind servers and proxies that forbid such pings.
"""

from __future__ import annotations

from dataclasses import dataclass

import grpc

MAX_MESSAGE_BYTES = 64 << 20
_NEVER_MS = (1 << 31) - 1  # gRPC's options are 32-bit integers; this one means never


def milliseconds(seconds: float) -> int:
    """Returns `seconds`, perhaps infinity, as an option of gRPC."""
    return _NEVER_MS if seconds >= _NEVER_MS / 1000 else round(1000 * seconds)


@dataclass(frozen=True, slots=True)
class Pings:
    """How a silent peer is noticed. Answers come from gRPC's own threads: a peer whose Python code is busy still answers."""

    every_s: float  # a ping is due once nothing has arrived for so long
    timeout_s: float  # a ping that is not answered for so long ends the connection

    def options(self) -> list[tuple[str, int]]:
        """Returns the options of a channel or a server.

        A ping waits behind the data that was sent before it. So `timeout_s` must be longer than the link needs for a message.
        """
        timeout_ms = milliseconds(self.timeout_s)
        return [
            ("grpc.keepalive_time_ms", milliseconds(self.every_s)),
            ("grpc.keepalive_timeout_ms", timeout_ms),  # how long the kernel sends again to an address that has gone
            ("grpc.http2.ping_timeout_ms", timeout_ms),  # how long gRPC waits for the answer; 60 s by default
            ("grpc.http2.max_pings_without_data", 0),  # no limit to the pings that we send
        ]


# Between services: a stopped process is noticed 1.0 to 1.5 s after it stopped.
SERVICE_PINGS = Pings(0.5, 1.0)
# Of clients. A gRPC server with default settings counts pings that come less than 5 min after the one before, until it sends
# data; the third one ends the connection: GOAWAY "too many pings".
CLIENT_PINGS = Pings(310.0, 20.0)
# Of the gateway, to its clients. nginx ends a stream at the 1000th ping of its upstream, here after 8 hours. A slow link
# needs seconds for a long prompt.
GATEWAY_PINGS = Pings(30.0, 20.0)
CLIENT_CONNECT_S = 20.0  # for TCP and the first frames of HTTP/2, several round trips; gRPC's default
_ALWAYS_PING = ("grpc.keepalive_permit_without_calls", 1)
_OWN_CONNECTION = (
    ("grpc.enable_http_proxy", 0),
    # One connection per channel: a new replica at an old address must not inherit the old one's broken connection.
    ("grpc.use_local_subchannel_pool", 1),
)


def _sizes(receive_bytes: int = MAX_MESSAGE_BYTES) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", receive_bytes),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ]


def server_options(pings: Pings) -> list[tuple[str, int]]:
    """Returns the options of a server: message sizes, and pings that also find dead connections without calls."""
    return [*_sizes(), *pings.options(), _ALWAYS_PING]


def channel(address: str, receive_bytes: int = MAX_MESSAGE_BYTES) -> grpc.aio.Channel:
    """Returns an insecure channel between services, whose calls break 1.5 s after the peer has stopped.

    A call breaks, too, if a message of more than `receive_bytes` arrives. Such a message takes no memory.
    """
    options = [
        *_sizes(receive_bytes),
        *SERVICE_PINGS.options(),
        _ALWAYS_PING,
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),  # also the time limit for connecting
        ("grpc.max_reconnect_backoff_ms", 1000),
        # gRPC 1.85 retries a call that was not sent because its connection broke, on the same connection, until it notices the
        # break: up to 1 s at 400 MB/s of memory, after this process was stopped. Callers here resend by themselves.
        ("grpc.enable_retries", 0),
        *_OWN_CONNECTION,
    ]
    return grpc.aio.insecure_channel(address, options=options)


def client_options(pings: Pings, connect_timeout_s: float) -> list[tuple[str, int]]:
    """Returns the options of a channel from a client of the public API, for `grpc.insecure_channel` or that of grpc.aio."""
    return [
        *_sizes(),
        *pings.options(),
        ("grpc.keepalive_permit_without_calls", 0),  # default servers forbid such pings
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", milliseconds(connect_timeout_s)),  # only that, despite its name
        ("grpc.max_reconnect_backoff_ms", 3000),  # 2 min by default: too late for a gateway that is back
        *_OWN_CONNECTION,
    ]
