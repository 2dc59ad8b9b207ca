"""A reference for architectures that transformers lacks: a plain torch forward pass, written from their documentation.

The forward pass is outside the package, in a Python file with a dict `FORWARDS`. The dict maps an architecture to a function
`load(folder, dtype)`, which returns a function from token ids [T] to logits [T, V]. `tests/parity/references.py` is such a
file.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from moiety.errors import ConfigError
from moiety.model.checkpoint.checkpoint import Checkpoint

PLACE = Path("tests/parity/references.py")


class PlainReference:
    """A plain forward pass with those methods of a transformers model that `moiety parity` calls.

    It has no cache: for each new token it computes the whole text again.
    """

    def __init__(self, forward: Callable[[torch.Tensor], torch.Tensor]):
        self._forward = forward
        self.generation_config = SimpleNamespace()

    @classmethod
    def load(cls, checkpoint: Path, dtype: torch.dtype, file: Path | None) -> PlainReference:
        """Loads the forward pass for `checkpoint` from `file` (by default PLACE).

        Raises ConfigError where the file has no forward pass of the checkpoint's architecture.
        """
        file, architecture = file or PLACE, Checkpoint.open(checkpoint).architecture
        loaders = runpy.run_path(str(file))["FORWARDS"] if file.is_file() else {}
        if architecture not in loaders:
            reason = f"transformers has no {architecture} to compare with, and this file has no forward pass of it"
            raise ConfigError(
                "references", str(file), f"{reason} (run in a checkout of the project, or name another file)"
            )
        return cls(loaders[architecture](checkpoint, dtype))

    def __call__(self, text: torch.Tensor) -> Any:
        """Returns an object with `logits` [1, T, V] for the token ids `text` [1, T]."""
        return SimpleNamespace(logits=self._forward(text[0])[None])

    def generate(self, ids: torch.Tensor, *, max_new_tokens: int, **_: Any) -> torch.Tensor:
        """Returns the token ids [1, T + max_new_tokens]: `ids` [1, T], then the greedy tokens."""
        for _step in range(max_new_tokens):
            ids = torch.cat((ids, self._forward(ids[0])[-1:].argmax(dim=-1)[None]), dim=1)
        return ids
