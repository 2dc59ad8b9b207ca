"""Reads what servers of OpenAI's API answer: when to try again, and the message of an error."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from math import isfinite
from typing import Any

SHOWN = 300  # characters of an error that is not in OpenAI's shape


def retry_after_s(header: str | None, now: datetime | None = None) -> float | None:
    """Returns the seconds that the value of a Retry-After header asks to wait: a number or a date. None for neither."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            at = parsedate_to_datetime(header)
        except ValueError:
            return None
        at = at if at.tzinfo else at.replace(tzinfo=UTC)
        seconds = (at - (now or datetime.now(UTC))).total_seconds()
    return max(0.0, seconds) if isfinite(seconds) else None


def error_message(body: bytes) -> str:
    """Returns the message of an error body: of OpenAI's shape, of the shape that FastAPI gives by default, or plain text."""
    try:
        return message_of(json.loads(body))
    except (ValueError, RecursionError):
        return " ".join(body[: 4 * SHOWN].decode("utf-8", "replace").split())[:SHOWN]


def message_of(value: Any) -> str:
    """Returns the message of an error that came as JSON.

    It looks for {"error": {"message": …}}, {"error": …}, {"message": …} and {"detail": …}.
    """
    if isinstance(value, dict):
        for name in ("error", "message", "detail"):
            if value.get(name):
                return message_of(value[name])
    return (value if isinstance(value, str) else json.dumps(value))[:SHOWN]
