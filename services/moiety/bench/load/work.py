"""The settings of one run of the load generator."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Literal

from moiety.bench.load.arrivals import Arrivals
from moiety.bench.load.goodput import Target
from moiety.errors import InvalidRequest

Endpoint = Literal["completions", "chat"]
PATHS: Mapping[Endpoint, str] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
MOST_TOKENS = 1 << 20


@dataclass(frozen=True, slots=True)
class Length:
    """A number of tokens: fixed, or drawn evenly from `low` to `high`, both included."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Length:
        """Reads NUMBER or LO:HI. Raises InvalidRequest."""
        match = re.fullmatch(r"(\d{1,9})(?::(\d{1,9}))?", text)
        if match is not None:
            low, high = int(match[1]), int(match[2] or match[1])
            if 1 <= low <= high <= MOST_TOKENS:
                return cls(low, high)
        raise InvalidRequest("tokens", text, f"NUMBER or LO:HI, from 1 to {MOST_TOKENS}")

    def draw(self, random: Random) -> int:
        """Returns a length."""
        return random.randint(self.low, self.high)

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}:{self.high}"


@dataclass(frozen=True, slots=True)
class LoadWork:
    """The load to offer. Exactly one of `rate`, `concurrency` and `trace` is set."""

    url: str
    rate: float | None = None  # requests per second: open loop
    concurrency: int | None = None  # requests at once: closed loop
    trace: Path | None = None  # open loop, with the times and lengths of this file
    speed: float = 1.0  # of the trace: 2 halves the times between its requests
    arrivals: Arrivals = "poisson"
    burstiness: float = 1.0  # of arrivals "gamma"
    requests: int | None = None  # at most
    seconds: float | None = None  # requests arrive for so long; those under way are waited for
    input_tokens: Length = Length(256, 256)
    output_tokens: Length = Length(64, 64)
    dataset: Path | None = None  # prompts, instead of synthetic ones
    endpoint: Endpoint = "completions"
    model: str | None = None  # default: the server's first
    ignore_eos: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)  # fields to add to every request
    seed: int = 0
    warmup: int = 1  # requests before the measurement, all at once
    timeout_s: float = 600.0  # of one request
    max_in_flight: int = 4096  # requests at once in an open loop; those that arrive beyond are counted, not sent
    goodput: tuple[Target, ...] = ()

    def __post_init__(self) -> None:
        """Raises InvalidRequest where the options contradict each other."""
        chosen = [name for name in ("rate", "concurrency", "trace") if getattr(self, name) is not None]
        if len(chosen) != 1:
            bound = "exactly one of --rate, --concurrency and --trace"
            raise InvalidRequest("kind of load", " and ".join(f"--{name}" for name in chosen) or "none", bound)
        if self.trace is not None and self.dataset is not None:
            raise InvalidRequest("--dataset", str(self.dataset), "left out with --trace, which has its own lengths")
        if self.rate is None and self.arrivals != "poisson":
            raise InvalidRequest("--arrivals", self.arrivals, f"left out with --{chosen[0]}")
        if self.burstiness != 1.0 and self.arrivals != "gamma":
            raise InvalidRequest("--burstiness", self.burstiness, "given with --arrivals gamma")
        if self.speed != 1.0 and self.trace is None:
            raise InvalidRequest("--speed", self.speed, "given with --trace")

    @property
    def most_requests(self) -> int | None:
        """The number of requests after which no more arrive; None without such a limit."""
        if self.requests is None and self.seconds is None and self.trace is None:
            return 100
        return self.requests

    @property
    def path(self) -> str:
        """The path that requests go to."""
        return PATHS[self.endpoint]
