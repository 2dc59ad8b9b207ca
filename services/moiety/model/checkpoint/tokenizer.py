"""Opens a checkpoint's tokenizer and says what its ids are: ends of sequence, text, bytes. Gateways and routers use this."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from moiety.errors import CheckpointError
from moiety.model.checkpoint.side_files import TOKENIZER_FILES, check_side_files, end_ids


def open_tokenizer(folder: str) -> tuple[Any, tuple[int, ...]]:
    """Returns the tokenizer in `folder` and its end-of-sequence ids. Raises CheckpointError if there is no usable one."""
    check_side_files(Path(folder), TOKENIZER_FILES)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises whatever its parsers raise
        raise CheckpointError(f"{folder}: no usable tokenizer: {error}") from error
    return tokenizer, end_ids(folder, tokenizer.eos_token_id)


class TokenKinds:
    """Which ids of a tokenizer decoding turns into text, and which of these are single bytes."""

    def __init__(self, tokenizer: Any):
        self._token = tokenizer.convert_ids_to_tokens
        self._special = frozenset(tokenizer.all_special_ids)
        # Those of tokens such as "<0xE2>", for decoders that join these to characters.
        self.byte_ids: frozenset[int] = frozenset()
        if tokenizer.is_fast:
            backend = tokenizer.backend_tokenizer
            added = backend.get_added_tokens_decoder().items()
            self._special = frozenset(token_id for token_id, token in added if token.special)
            if backend.decoder is not None and backend.decoder.decode(["<0x41>"]) == "A":
                found = (backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
                self.byte_ids = frozenset(token_id for token_id in found if token_id is not None)

    def has_text(self, token_id: int) -> bool:
        """Returns whether decoding keeps a token: it skips special tokens, and ids that the tokenizer does not have."""
        return token_id not in self._special and self._token(token_id) is not None
