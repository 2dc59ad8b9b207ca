"""MiniMax: its experts use transformers' experts interface, but not every config can be served."""

from __future__ import annotations

from typing import Any

from moiety.model.architectures.adapters.adapter import Adapter


class MiniMax(Adapter):
    """Adapter for MiniMax, whose full-attention layers would apply a sliding window, too. No published checkpoint sets one."""

    def amend(self, config: Any) -> None:
        if config.sliding_window is not None:
            raise ValueError(f"sliding_window {config.sliding_window}: windows in its full attention are not supported")
