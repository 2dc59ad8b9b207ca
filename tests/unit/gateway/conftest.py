"""The tiny tokenizer, opened once."""

from __future__ import annotations

import pytest

from moiety.gateway.text import Tokenizer
from moiety.model.tiny_tokenizer import write_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The byte-level BPE of 320 tokens that tiny checkpoints have."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer(str(folder))
