"""Faults that a device can be told to show, for trials of an own system: `moiety chaos` and tests set them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import inf, nan
from typing import Any

import torch

from moiety.errors import ConfigError

LOOK_S = 0.01  # how often a hanging device looks whether it may go on


@dataclass(frozen=True, slots=True)
class Fault:
    """What a faulty device does to every batch. `seconds`: by how much a slow one delays a batch."""

    kind: str  # raise, nan, hang or slow
    seconds: float = 0.0

    @classmethod
    def parse(cls, value: Any) -> Fault | None:
        """Parses "raise", "nan", "hang" or "slow SECONDS"; None for an empty text. Raises ConfigError for anything else.

        `raise`: each batch fails. `nan`: each batch gives NaN. `hang`: no batch ends until the fault is cleared. `slow`:
        each batch takes SECONDS longer.
        """
        kind, _, argument = value.partition(" ") if isinstance(value, str) else (None, "", "")
        if kind == "slow":
            try:
                seconds = float(argument)
            except ValueError:
                seconds = nan
            if 0.0 < seconds < inf:
                return cls("slow", seconds)
        elif kind in ("raise", "nan", "hang") and not argument:
            return cls(kind)
        elif value == "":
            return None
        bound = "must be raise, nan, hang or slow SECONDS, such as slow 0.2, or empty for none"
        raise ConfigError("user_config.fault", value, bound)

    def strike(self, outputs: torch.Tensor, lasts: Callable[[], bool]) -> torch.Tensor:
        """Returns what the faulty device gives instead of a batch's `outputs`. `lasts()`: whether the fault is still set."""
        match self.kind:
            case "raise":
                raise RuntimeError("the device fault `raise` is set")
            case "nan":
                return outputs * nan
            case "hang":
                while lasts():
                    time.sleep(LOOK_S)
            case "slow":
                time.sleep(self.seconds)
        return outputs
