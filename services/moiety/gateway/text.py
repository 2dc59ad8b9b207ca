"""Text to token ids and back. The only part of the system that knows about text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from moiety.errors import CheckpointError, InvalidRequest

MAX_PROMPT_BYTES = 16 << 20
_PARTIAL = "\ufffd"  # what a decoder shows for the bytes of an unfinished character


class Tokenizer:
    """A checkpoint's tokenizer, and the ids that end its generations."""

    def __init__(self, folder: str):
        """Raises CheckpointError when the folder has no usable tokenizer."""
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # transformers raises whatever its parsers raise
            raise CheckpointError(f"{folder}: no usable tokenizer: {error}") from error
        self.stop_ids = _stop_ids(Path(folder), self._tokenizer)

    def encode(self, text: str) -> list[int]:
        """Raises InvalidRequest when the text is empty or beyond all reason."""
        if not text:
            raise InvalidRequest("prompt.text", text, "at least one character")
        if len(text) > MAX_PROMPT_BYTES:
            raise InvalidRequest("prompt.text", f"{len(text)} characters", f"at most {MAX_PROMPT_BYTES}")
        ids: list[int] = self._tokenizer.encode(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text


class Detokenizer:
    """Turns a stream of token ids into a stream of text: characters are sent once they are whole.

    Decodes from a little before the new tokens, since how a token reads depends on the one before it.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown_from, self._shown_to = 0, 0  # ids[shown_from:shown_to] give context and are already sent

    def push(self, ids: Sequence[int], *, last: bool = False) -> str:
        """The new text; `last` flushes an unfinished character too."""
        self._ids.extend(ids)
        shown = self._tokenizer.decode(self._ids[self._shown_from : self._shown_to])
        text = self._tokenizer.decode(self._ids[self._shown_from :])
        if len(text) <= len(shown) or (text.endswith(_PARTIAL) and not last):
            return ""
        self._shown_from, self._shown_to = self._shown_to, len(self._ids)
        return text[len(shown) :]


def _stop_ids(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """End-of-sequence ids: generation_config.json, else config.json, and the tokenizer's own."""
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
