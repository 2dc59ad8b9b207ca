"""The tiny tokenizer, opened once."""

from __future__ import annotations

import pytest

from moiety.gateway.text.tokenizer import Tokenizer
from moiety.synthetic.tokenizer import write_tokenizer


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the byte-level BPE tokenizer of 320 tokens that tiny checkpoints have."""
    made = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(made)
    return str(made)


@pytest.fixture(scope="session")
def tokenizer(folder: str) -> Tokenizer:
    """The tokenizer of `folder`."""
    return Tokenizer(folder)
