"""Builds all gRPC channels, and holds what they share with servers: keepalive and message size limits."""

from __future__ import annotations

import grpc

MAX_MESSAGE_BYTES = 64 << 20
# Without keepalive a cut link hangs for over a minute; with these settings it is noticed within two seconds.
KEEPALIVE_MS = 1000
COMMON_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
_OPTIONS = [
    *COMMON_OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_http_proxy", 0),
    # One connection per channel: a new replica at an old address must not inherit the old one's broken connection.
    ("grpc.use_local_subchannel_pool", 1),
]


def channel(address: str) -> grpc.aio.Channel:
    """Returns an insecure channel that notices a dead peer within two seconds."""
    return grpc.aio.insecure_channel(address, options=_OPTIONS)
