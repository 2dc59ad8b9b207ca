"""What gRPC says of connections, in plain words: its own sentences speak of its parts, and name an address in their way."""

from __future__ import annotations

import re

# The first pattern that is found in the details of a status says what happened.
_WORDS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), words)
    for pattern, words in (
        (r"Connection refused", "nobody listens there (connection refused)"),
        (r"Misformatted domain name|target uri is not valid", "that is no HOST:PORT"),
        (r"^errors resolving|DNS resolution failed|address lookup failed", "no such host name"),
        (r"No route to host|Network is unreachable|Host is unreachable", "no way to that host"),
        (
            r"Failed parsing HTTP/2|http1\.x server|Missing HTTP/2",
            "what listens there is no gRPC server; the HTTP API has a port of its own",
        ),
        (r"before receiving SETTINGS", "connecting timed out: nothing came back"),
        (r"failed to connect to all addresses.*(timed? ?out|FD [Ss]hutdown)", "connecting timed out"),
        (r"keepalive|[Pp]ing timeout", "the connection broke: no answer to a ping"),
        (r"[Tt]oo[ _]many[ _]pings", "the server ended the connection: Too many pings"),
        (r"^Received http2 header with status: (?P<of>\d+)", "a proxy answered with HTTP status"),
        (r"^Method not found!?$", "a gRPC server listens there, but not this service"),
        (
            r"[Cc]onnection reset|Socket closed|Broken pipe|End of TCP stream|recvmsg|sendmsg|RST_STREAM|GOAWAY"
            r"|Stream removed|Transport closed|failed to connect to all addresses",
            "the connection broke",
        ),
        (r"^Deadline Exceeded$", "no answer in time"),
    )
)


def in_words(details: str) -> str:
    """Returns the `details` of a gRPC status in plain words if they are gRPC's own; a service's message as it is."""
    for pattern, words in _WORDS:
        if found := pattern.search(details):
            return f"{words} {found['of']}" if "of" in pattern.groupindex else words
    return details
