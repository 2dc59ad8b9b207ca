"""Reads and writes the W3C trace context of an RPC, which travels in its gRPC metadata."""

from __future__ import annotations

import grpc

TRACEPARENT = "traceparent"


def traceparent_in(context: grpc.aio.ServicerContext) -> str | None:
    """Returns the caller's W3C trace context, or None if the RPC's metadata has none."""
    return next((value for key, value in context.invocation_metadata() or () if key == TRACEPARENT), None)


def with_traceparent(traceparent: str) -> tuple[tuple[str, str], ...]:
    """Returns the gRPC metadata that carries `traceparent`; empty for "", the traceparent of a span that is not sampled."""
    return ((TRACEPARENT, traceparent),) if traceparent else ()
