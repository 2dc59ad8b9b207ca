"""What the benchmarks check of the model that they are to measure, before they import and start anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moiety.bench.checkpoints import SYNTHETIC
from moiety.cli.options import check_first
from moiety.errors import ConfigError


def check_model(options: Mapping[str, Any]) -> None:
    """Checks `model` against `groups`, `prompt_tokens` and `new_tokens`.

    A synthetic model gets the context that it needs. Raises CheckpointError or ConfigError.
    """
    model, groups = options["model"], options["groups"]
    if model not in SYNTHETIC:
        check_first(model, groups=groups, tokens=options["prompt_tokens"] + options["new_tokens"])
    elif groups > (experts := SYNTHETIC[model]["num_experts"]):
        raise ConfigError("groups", groups, f"must be 1 to {experts}, the model's experts per layer")
