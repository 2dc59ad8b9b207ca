"""The HTTP API of a whole system, as clients are configured for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ServedApi:
    """Where the API is, and what is served there."""

    http: str  # host:port
    grpc: str  # host:port
    folder: str  # of the checkpoint
    model: str
    no_thinking: Mapping[str, int]  # a logit_bias: random weights seldom end what they have begun to think

    @property
    def url(self) -> str:
        """The base URL of OpenAI's API."""
        return f"http://{self.http}/v1"

    @property
    def options(self) -> dict[str, Any]:
        """What most clients are given: they do not retry."""
        return {"model": self.model, "base_url": self.url, "api_key": "none", "max_retries": 0}
