"""Trace context in gRPC metadata."""

from __future__ import annotations

import grpc

TRACEPARENT = "traceparent"


def traceparent_in(context: grpc.aio.ServicerContext) -> str | None:
    """Returns the caller's W3C trace context, or None where it sent none."""
    return next((value for key, value in context.invocation_metadata() or () if key == TRACEPARENT), None)


def with_traceparent(traceparent: str) -> tuple[tuple[str, str], ...]:
    """Returns the metadata of a call; empty when `traceparent` is, because the caller's span is not sampled."""
    return ((TRACEPARENT, traceparent),) if traceparent else ()
