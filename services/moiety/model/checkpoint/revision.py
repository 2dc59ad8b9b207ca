"""Computes a checkpoint's revision, a hash of its content: services with equal revisions are taken to hold the same model.

The revision is a BLAKE2b hash of the config, the tokenizer's files, and each shard's header, size and sampled blocks. Every
tensor counts with its first, middle and last block, a large one with a block of every SPACING_BYTES besides. A fine-tune
changes at least one of these, unless it changes only a few rows between two samples. `verify="full"` reads every byte and
also detects a single flipped bit.

Sampling reads some 0.1 % of a checkpoint, SHARDS_AT_ONCE shards at a time. `python tests/bench/revision_cost.py` measures it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from moiety.config.cache_folder import cache_dir
from moiety.config.options import Verify
from moiety.errors import CheckpointError
from moiety.model.checkpoint.checkpoint import AUTOGPTQ_FILE, MODELOPT_FILE, Checkpoint
from moiety.model.checkpoint.headers import TensorEntry, read_header

DIGEST_BYTES = 16
BLOCK_BYTES = 4096
FORMAT = 2  # of the hash: increase it with every change of what is hashed
SPACING_BYTES = 4 << 20
SHARDS_AT_ONCE = 16  # storage answers many reads at once faster than one after another
COMPANIONS = (
    "generation_config.json",
    MODELOPT_FILE,
    AUTOGPTQ_FILE,
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

# File, size, times of the last changes of content and of the inode in ns, inode. The kernel sets the second time, so
# content cannot change and leave all of these as they were.
_Stamp = tuple[str, int, int, int, int]


def revision_of(checkpoint: Checkpoint, verify: Verify = "sampled") -> str:
    """Returns the revision of `checkpoint`, 32 hex digits. It is cached, on disk too, until a file changes.

    `sampled` and `full` give different revisions, so all services of one system must use the same. Raises CheckpointError
    if a file cannot be read.
    """
    companions = [checkpoint.path / name for name in COMPANIONS]
    stamps = tuple(_stamp(file) for file in [*checkpoint.shards, *filter(Path.is_file, companions)])
    config = {key: value for key, value in checkpoint.config.items() if key not in INCIDENTAL}
    return _cached(json.dumps(config, sort_keys=True), len(checkpoint.shards), stamps, verify)


def pinned_revision(checkpoint: Checkpoint, verify: Verify, wanted: str) -> str:
    """Returns the revision of `checkpoint`. Raises CheckpointError if it is not `wanted`; an empty `wanted` allows any."""
    found = revision_of(checkpoint, verify)
    if wanted and found != wanted:
        raise CheckpointError(
            f"{checkpoint.path} has revision {found}, but this system serves revision {wanted}: "
            "copy the same checkpoint to every node, or deploy again"
        )
    return found


@lru_cache(maxsize=64)
def _cached(config: str, shards: int, stamps: tuple[_Stamp, ...], verify: Verify) -> str:
    """Returns the revision from the cache on disk, or computes it. The arguments are the key: a changed file is read again.

    `stamps` are those of the `shards` shards, then those of the COMPANIONS.
    """
    key = hashlib.blake2b(repr((FORMAT, config, shards, stamps, verify)).encode(), digest_size=DIGEST_BYTES).hexdigest()
    file = folder / "revisions" / key if (folder := cache_dir()) else None
    with contextlib.suppress(OSError):
        if file and len(revision := file.read_text(encoding="ascii")) == 2 * DIGEST_BYTES:
            return revision
    revision = _digest(config, shards, stamps, verify)
    if file:
        with contextlib.suppress(OSError):  # without a writable cache the next reader computes it again
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="ascii") as new:
                new.write(revision)
            os.replace(new.name, file)
    return revision


def _digest(config: str, shards: int, stamps: tuple[_Stamp, ...], verify: Verify) -> str:
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    _add(digest, verify.encode())
    _add(digest, config.encode())
    files = [Path(name) for name, *_ in stamps]
    try:
        with ThreadPoolExecutor(SHARDS_AT_ONCE) as threads:
            contents = threads.map(
                _content, files, [position >= shards or verify == "full" for position in range(len(files))]
            )
            for file, (_, size, *_), content in zip(files, stamps, contents, strict=True):
                _add(digest, file.name.encode())
                _add(digest, str(size).encode())
                _add(digest, content)
    except OSError as error:
        raise CheckpointError(f"checkpoint file cannot be read: {error}") from error
    return digest.hexdigest()


def _content(file: Path, whole: bool) -> bytes:
    """Returns a hash of the whole `file`, or of the samples of a shard."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    if whole:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    else:
        for block in _samples(file):
            _add(digest, block)
    return digest.digest()


def _samples(file: Path) -> Iterator[bytes]:
    """Yields the parts of a shard to hash: its header, then the sampled blocks of each tensor."""
    entries = sorted(read_header(file).values(), key=lambda entry: entry.start)
    with file.open("rb", buffering=0) as stream:
        if hasattr(os, "posix_fadvise"):  # or each read of a block would read 128 KiB ahead
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        yield os.pread(stream.fileno(), entries[0].start if entries else file.stat().st_size, 0)
        for entry in entries:
            for start in sampled_blocks(entry):
                yield os.pread(stream.fileno(), min(BLOCK_BYTES, entry.end - start), start)


def sampled_blocks(entry: TensorEntry) -> Iterator[int]:
    """Yields where the sampled blocks of a tensor begin: evenly spaced from its first to its last block, at least three."""
    last = max(entry.nbytes - BLOCK_BYTES, 0)
    intervals = max(2, -(-last // SPACING_BYTES))
    yield from sorted({entry.start + last * position // intervals for position in range(intervals + 1)})


def _add(digest: hashlib.blake2b, part: bytes) -> None:
    """Hashes the length of `part`, then `part`, so that the same bytes divided into other parts give another digest."""
    digest.update(len(part).to_bytes(8, "little"))
    digest.update(part)


def _stamp(file: Path) -> _Stamp:
    try:
        status = file.stat()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error
    return str(file), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
