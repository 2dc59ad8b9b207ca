"""The expert layout of a checkpoint: the shape of its MoE layers, and which tensors hold each expert's weights.

Deriving it needs transformers (`derive.py`); it is kept as JSON per revision, so that only the first reader of a
revision pays for that.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moiety.config import cache_dir
from moiety.core import ExpertMLP, ModelShape
from moiety.model.checkpoint import Checkpoint
from moiety.model.revision import revision

FORMAT = 3  # of the cached file; raise it with every change of ExpertLayout
EXPERT = "{expert}"  # stands for the expert id in a tensor's name


@dataclass(frozen=True, slots=True)
class LayerLayout:
    """One MoE layer: where its experts sit in the model and which tensors they are read from.

    `sources` maps each parameter (a field of moiety_kernels.ExpertWeights) to the tensors it is concatenated from, along
    an expert's own dimension 0. A name with `{expert}` in it is one tensor per expert; a name without is a fused tensor,
    one expert after the other along dim 0. Matrices of the fields in `transposed` are published [in, out]; they are held
    [out, in], as all others.
    """

    module: str
    sources: Mapping[str, tuple[str, ...]]
    transposed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """A model's shape and, per MoE layer ordinal, where its experts are published."""

    shape: ModelShape
    layers: tuple[LayerLayout, ...]


def expert_layout(checkpoint: Checkpoint) -> ExpertLayout:
    """The layout of `checkpoint`, from the cache or derived; raises CheckpointError where it cannot be served."""
    # transformers moves modules between releases, so a layout is good for one release only.
    key = {"format": FORMAT, "transformers": version("transformers")}
    folder = cache_dir()
    file = folder / revision(checkpoint) / "layout.json" if folder else None
    if file and (known := _read(file, key)) is not None:
        return known

    from moiety.model.derive import derive_layout  # imports transformers: 4.5 s that a cached layout saves

    layout = derive_layout(checkpoint)
    if file:
        with contextlib.suppress(OSError):  # an unwritable cache costs the next reader time, nothing else
            _write(file, {**key, "layout": asdict(layout)})
    return layout


def _read(file: Path, key: Mapping[str, Any]) -> ExpertLayout | None:
    """The cached layout; None where there is none, or one of another format, release or of garbage."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
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


def _write(file: Path, data: Mapping[str, Any]) -> None:
    """Atomic: a reader sees the whole file or none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=file.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(data, stream)
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise
