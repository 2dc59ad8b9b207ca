"""Caches expert layouts as JSON, one per revision, because deriving a layout takes an import of transformers."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moiety.config.cache_folder import cache_dir, prune_derived, read_derived, write_derived
from moiety.core.experts import ExpertMLP, ModelShape
from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.checkpoint.revision import revision_of
from moiety.model.experts.layout import ExpertLayout, LayerLayout

FORMAT = 6  # increase it with every change of ExpertLayout, and of what `derive_layout` refuses


def expert_layout(checkpoint: Checkpoint) -> ExpertLayout:
    """Returns the expert layout of `checkpoint` from the cache, or derives it, which imports transformers.

    Raises CheckpointError if the checkpoint cannot be served.
    """
    # transformers moves modules between releases, so a layout is valid for one release only.
    key = {"format": FORMAT, "transformers": version("transformers")}
    folder = cache_dir()
    # The revision is only a key here: the sampled one serves, whatever the setting `verify` says.
    file = folder / revision_of(checkpoint) / "layout.json" if folder else None
    if file and (cached := _read(file, key)) is not None:
        return cached

    from moiety.model.experts.derive import derive_layout  # torch, transformers: 4.5 s that a cached layout saves

    layout = derive_layout(checkpoint)
    if file:
        with contextlib.suppress(OSError):  # without a writable cache the next reader derives the layout again
            write_derived(file, json.dumps({**key, "layout": asdict(layout)}))
            prune_derived(file.parent.parent.glob(f"*/{file.name}"))
    return layout


def _read(file: Path, key: Mapping[str, Any]) -> ExpertLayout | None:
    """Reads the cached layout; None if the file is missing, damaged, or of another format or transformers release."""
    try:
        data = json.loads(read_derived(file))
        if any(data[name] != value for name, value in key.items()):
            return None
        shape = data["layout"]["shape"]
        layers = tuple(
            LayerLayout(
                layer["module"],
                {name: tuple(tensors) for name, tensors in layer["sources"].items()},
                tuple(layer["transposed"]),
            )
            for layer in data["layout"]["layers"]
        )
        return ExpertLayout(ModelShape(**{**shape, "mlp": ExpertMLP(**shape["mlp"])}), layers)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
