"""What a router logs about states at start, and which settings it refuses for models with states."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moiety.compose.router_model import load_model
from moiety.config.services import RouterSettings
from moiety.errors import ConfigError
from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.experts.cached import expert_layout
from moiety.router.cache.kv_cache import KVCache

# bytes of tiny Jamba's three Mamba layers: convolution and recurrence, twice
PER_SLOT = 2 * 3 * (128 * 4 + 128 * 8) * 4
PER_TOKEN = 2 * 2 * 16 * 4  # bytes of its one attention layer


def loaded(folder: str, **settings: Any) -> KVCache:
    """Loads a router with these settings; returns its cache."""
    checkpoint = Checkpoint.open(folder)
    values = RouterSettings(model=folder, dtype="float32", **settings)
    return load_model(values, checkpoint, expert_layout(checkpoint), torch.float32, "r")[1]


def test_states_are_taken_out_of_kv_memory_and_logged(
    tiny: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    """Slots come first and blocks get the rest; one log line says so, and that prefixes are not reused."""
    with caplog.at_level(logging.INFO, logger="moiety.compose.router_model"):
        cache = loaded(tiny("jamba"), slots=8, kv_memory=1 << 20)
    assert cache.blocks == ((1 << 20) - 8 * PER_SLOT) // (16 * PER_TOKEN)
    assert cache.states.slots == 8
    assert f"states of {PER_SLOT} bytes in 8 slots; prefixes are not reused" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"kv_memory": 8 * PER_SLOT},
            rf"kv_memory = .* at least {8 * PER_SLOT + 16 * PER_TOKEN} bytes, for 8 slots of states",
        ),
        ({"speculative_tokens": 2}, r"speculative_tokens = 2: must be 0 for this model: its layers keep states"),
        (
            {"deterministic": True},
            r"deterministic = true: must be false for this model: the bits of states in its layers",
        ),
    ],
)
def test_settings_that_states_rule_out_are_refused(
    tiny: Callable[[str], str], settings: dict[str, Any], message: str
) -> None:
    """The error names the setting and its bound."""
    with pytest.raises(ConfigError, match=f"(?i){message}"):
        loaded(tiny("jamba"), slots=8, **settings)
