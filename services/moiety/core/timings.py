"""Where the time of a request went: a value that the gateway measures and the clients return."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of a request went, in seconds, as the gateway saw it."""

    queued_s: float  # from its arrival until a router had a place for it
    prefill_s: float  # from then until its first token
    decode_s: float  # from then until its last token
