"""A small corpus."""

from __future__ import annotations

from pathlib import Path

import pytest

from moiety.training.corpus import DOMAINS, encode
from moiety.training.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts of every domain, the tokenizer and the tokens."""
    folder = tmp_path_factory.mktemp("work")
    for domain in DOMAINS:
        (folder / "texts" / domain).mkdir(parents=True)
        documents = [
            "".join(f"{domain} number {number} of part {part}, {number * part}\n" for number in range(400))
            for part in range(80)
        ]
        (folder / "texts" / domain / "numbers.txt").write_text("\f".join(documents))
    encode(folder / "texts", train_tokenizer(folder / "texts", folder / "tokenizer"), folder / "tokens")
    return folder
