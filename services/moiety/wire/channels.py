"""Builds all gRPC channels, and holds what they share with servers: message size limits and how a silent peer is noticed."""

from __future__ import annotations

import grpc

MAX_MESSAGE_BYTES = 64 << 20
PING_MS = 500  # between two pings, also on a connection without calls
# A peer that does not answer a ping for this long is lost: a stopped process is noticed 1.0 to 1.5 s after it stopped.
# Answers come from gRPC's own threads, so a peer whose Python code is busy still answers.
PING_TIMEOUT_S = 1.0


def shared_options(ping_timeout_s: float, receive_bytes: int = MAX_MESSAGE_BYTES) -> list[tuple[str, int]]:
    """Returns the options of channels and servers. A peer whose answer to a ping takes `ping_timeout_s` is lost.

    A ping waits behind the data that was sent before it. So the time must be longer than the link needs for a message.
    """
    timeout_ms = round(1000 * ping_timeout_s)
    return [
        ("grpc.max_receive_message_length", receive_bytes),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", PING_MS),
        ("grpc.keepalive_timeout_ms", timeout_ms),  # how long the kernel sends again to an address that has gone
        ("grpc.http2.ping_timeout_ms", timeout_ms),  # how long gRPC waits for the answer; 60 s by default
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def channel(
    address: str, ping_timeout_s: float = PING_TIMEOUT_S, receive_bytes: int = MAX_MESSAGE_BYTES
) -> grpc.aio.Channel:
    """Returns an insecure channel, whose calls break within `ping_timeout_s` + 0.5 s after the peer has stopped.

    A call breaks, too, if a message of more than `receive_bytes` arrives. Such a message takes no memory.
    """
    options = [
        *shared_options(ping_timeout_s, receive_bytes),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
        ("grpc.enable_http_proxy", 0),
        # gRPC 1.85 retries a call that was not sent because its connection broke, on the same connection, until it notices the
        # break: up to 1 s at 400 MB/s of memory, after this process was stopped. Callers here resend by themselves.
        ("grpc.enable_retries", 0),
        # One connection per channel: a new replica at an old address must not inherit the old one's broken connection.
        ("grpc.use_local_subchannel_pool", 1),
    ]
    return grpc.aio.insecure_channel(address, options=options)
