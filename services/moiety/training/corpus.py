"""Token files for training: one of each domain to learn from, and one that is held out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor

from moiety.errors import FailedPrecondition
from moiety.training.cleaning.documents import BETWEEN_DOCUMENTS

DOMAINS = ("english", "german", "french", "spanish", "python", "shell")
PARTS = ("train", "heldout")
END = "<|endoftext|>"  # the token after each document
PIECE = 8_192  # characters of a document that are learned or held out together
HELD_OUT = 8  # of 256 pieces
LEAST = 2048  # tokens of a part of a domain


def documents(texts: Path, domain: str) -> Iterator[str]:
    """Yields the documents of a domain, from the files that `fetch` has written."""
    for file in sorted((texts / domain).glob("*.txt")):
        yield from file.read_text(encoding="utf-8").split(BETWEEN_DOCUMENTS)


def pieces(document: str) -> Iterator[str]:
    """Yields a document in pieces of about PIECE characters, each of which ends with a line."""
    start = 0
    while start < len(document):
        end = document.find("\n", start + PIECE)
        end = len(document) if end < 0 else end + 1
        yield document[start:end]
        start = end


def held_out(piece: str) -> bool:
    """Whether a piece is for measuring only. It depends on the piece alone: equal pieces of two texts are not split."""
    return hashlib.sha256(piece.encode()).digest()[0] < HELD_OUT


def encode(texts: Path, tokenizer: Tokenizer, folder: Path) -> dict[str, dict[str, int]]:
    """Writes the token files of every domain under `folder`; returns their tokens by domain and part.

    `texts` holds one folder of .txt files for each domain. Every document ends with the token END. Raises
    FailedPrecondition if a domain has too little text for both parts.
    """
    end = tokenizer.token_to_id(END)
    folder.mkdir(parents=True, exist_ok=True)
    sizes: dict[str, dict[str, int]] = {}
    for domain in DOMAINS:
        parts: dict[str, list[npt.NDArray[np.uint16]]] = {part: [] for part in PARTS}
        for document in documents(texts, domain):
            cut = list(pieces(document))
            for piece, encoded in zip(cut, tokenizer.encode_batch_fast(cut, add_special_tokens=False), strict=True):
                ids = [*encoded.ids, end] if piece is cut[-1] else encoded.ids
                parts["heldout" if held_out(piece) else "train"].append(np.array(ids, dtype=np.uint16))
        sizes[domain] = {part: sum(map(len, arrays)) for part, arrays in parts.items()}
        for part, arrays in parts.items():
            if sizes[domain][part] < LEAST:
                raise FailedPrecondition(
                    f"{texts / domain}: {sizes[domain][part]} tokens for {part}: must be {LEAST} or more"
                )
            np.concatenate(arrays).tofile(folder / f"{domain}.{part}.bin")
    return sizes


class Corpus:
    """The token files of a folder, as batches."""

    def __init__(self, folder: Path, weights: Sequence[float] | None = None):
        """`weights`: how much of a batch each of DOMAINS is; equal by default."""
        self._tokens = {
            (domain, part): np.memmap(folder / f"{domain}.{part}.bin", dtype=np.uint16, mode="r")
            for domain in DOMAINS
            for part in PARTS
        }
        self._weights = torch.tensor(weights or [1.0] * len(DOMAINS), dtype=torch.float64)

    def batch(self, seed: int, step: int, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """Returns int64[rows, length + 1] token ids and int64[rows] domains; they depend on the arguments only."""
        random = np.random.default_rng((seed, step))
        share = (self._weights / self._weights.sum()).numpy()
        domains = random.choice(len(DOMAINS), size=rows, p=share)
        chosen = [self._tokens[DOMAINS[domain], "train"] for domain in domains]
        starts = [int(random.integers(0, len(tokens) - length - 1)) for tokens in chosen]
        rows_of = [tokens[start : start + length + 1] for tokens, start in zip(chosen, starts, strict=True)]
        return torch.from_numpy(np.stack(rows_of).astype(np.int64)), torch.from_numpy(domains)

    def held_out(self, domain: str, rows: int, length: int) -> Tensor:
        """Returns int64[rows, length + 1] token ids spread evenly over what is held out of a domain."""
        tokens = self._tokens[domain, "heldout"]
        starts = np.linspace(0, len(tokens) - length - 1, rows).astype(int)
        return torch.from_numpy(np.stack([tokens[start : start + length + 1] for start in starts]).astype(np.int64))

    def sizes(self) -> dict[str, int]:
        """Returns the tokens to learn from, by domain."""
        return {domain: len(self._tokens[domain, "train"]) for domain in DOMAINS}
