"""Opens a checkpoint's tokenizer and reads its end-of-sequence ids; gateways and routers both use this."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from moiety.errors import CheckpointError


def open_tokenizer(folder: str) -> tuple[Any, tuple[int, ...]]:
    """Returns the tokenizer in `folder` and its end-of-sequence ids. Raises CheckpointError if there is no usable one."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises whatever its parsers raise
        raise CheckpointError(f"{folder}: no usable tokenizer: {error}") from error
    return tokenizer, _eos_ids(Path(folder), tokenizer)


def _eos_ids(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """Returns the end-of-sequence ids of the tokenizer and of one file: generation_config.json, or else config.json."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
        if value is not None:
            found.update(value if isinstance(value, list) else [value])
            break
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    return tuple(sorted(found))
