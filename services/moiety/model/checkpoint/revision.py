"""Computes a checkpoint's revision, a hash of its content: services with equal revisions are taken to hold the same model.

The revision is a BLAKE2b hash of the config, the tokenizer's files, and each shard's header, size and sampled blocks.
Sampling detects a fine-tune that changes most tensors, but can miss a change in a few places. `verify="full"` reads
every byte and also detects a single flipped bit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Literal

from moiety.errors import CheckpointError
from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.checkpoint.headers import TensorEntry, read_header

Verify = Literal["sampled", "full"]

DIGEST_BYTES = 16
BLOCK_BYTES = 4096
SAMPLED_TENSORS = 256  # per shard, spread evenly: 1,200 tensors a shard (Qwen3-30B-A3B) cost 256 page reads
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
INCIDENTAL = ("_name_or_path", "transformers_version")  # config keys that differ between copies of one model

_Stamp = tuple[str, int, int]  # file, size, modification time in ns


def revision_of(checkpoint: Checkpoint, verify: Verify = "sampled") -> str:
    """Returns the revision of `checkpoint`, 32 hex digits; cached until a file's size or modification time changes.

    `sampled` and `full` give different revisions, so all services of one application must use the same setting.
    """
    companions = [checkpoint.path / name for name in COMPANIONS]
    stamps = tuple(_stamp(file) for file in [*checkpoint.shards, *filter(Path.is_file, companions)])
    config = {key: value for key, value in checkpoint.config.items() if key not in INCIDENTAL}
    return _digest(json.dumps(config, sort_keys=True), len(checkpoint.shards), stamps, verify)


@lru_cache(maxsize=64)
def _digest(config: str, shards: int, stamps: tuple[_Stamp, ...], verify: Verify) -> str:
    """Computes the revision from the config and from the files in `stamps`: first the `shards` shards, then the COMPANIONS.

    The arguments are the cache's key. A stamp has a file's size and modification time, so a changed file is hashed again.
    """
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    _add(digest, verify.encode())
    _add(digest, config.encode())
    try:
        for position, (name, size, _) in enumerate(stamps):
            file = Path(name)
            _add(digest, file.name.encode())
            _add(digest, str(size).encode())
            if position >= shards or verify == "full":
                with file.open("rb") as stream:
                    while block := stream.read(1 << 22):
                        digest.update(block)
            else:
                for block in _samples(file):
                    _add(digest, block)
    except OSError as error:
        raise CheckpointError(f"checkpoint file cannot be read: {error}") from error
    return digest.hexdigest()


def _samples(file: Path) -> Iterator[bytes]:
    """Yields the parts of a shard to hash: its header, then one block from the middle of each sampled tensor."""
    entries = sorted(read_header(file).values(), key=lambda entry: entry.start)
    with file.open("rb") as stream:
        yield stream.read(entries[0].start if entries else -1)
        for entry in _spread(entries):
            stream.seek(max(entry.start, (entry.start + entry.end - BLOCK_BYTES) // 2))
            yield stream.read(min(BLOCK_BYTES, entry.end - entry.start))


def _spread(entries: list[TensorEntry]) -> list[TensorEntry]:
    step = max(1.0, len(entries) / SAMPLED_TENSORS)
    return [entries[int(position * step)] for position in range(min(len(entries), SAMPLED_TENSORS))]


def _add(digest: hashlib.blake2b, part: bytes) -> None:
    """Hashes the length of `part`, then `part`, so that the same bytes divided into other parts give another digest."""
    digest.update(len(part).to_bytes(8, "little"))
    digest.update(part)


def _stamp(file: Path) -> _Stamp:
    try:
        status = file.stat()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error
    return str(file), status.st_size, status.st_mtime_ns
