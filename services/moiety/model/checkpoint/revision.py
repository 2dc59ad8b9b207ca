"""Computes a checkpoint's revision, a hash of its content: services with equal revisions are taken to hold the same model.

The revision is a BLAKE2b hash of the config, the tokenizer's files, and each shard's header, size and sampled blocks. Of
every tensor the first, middle and last block count, of a large one a block of every SPACING_BYTES besides. Tensors with a
row per token, in which a fine-tune may change a few rows only, are read whole. `verify="full"` reads every byte, and also
detects a single flipped bit anywhere.

`python tests/bench/revision_cost.py` measures the cost for a checkpoint of DeepSeek-V3's size.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from moiety.config.cache_folder import cache_dir, prune_derived, read_derived, write_derived
from moiety.config.options import Verify
from moiety.errors import CheckpointError
from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.checkpoint.files import unreadable
from moiety.model.checkpoint.headers import TensorEntry, read_header
from moiety.model.checkpoint.side_files import AUTOAWQ_FILE, AUTOGPTQ_FILE, GENERATION_FILE, MODELOPT_FILE

DIGEST_BYTES = 16
BLOCK_BYTES = 4096
READ_BYTES = 4 << 20
FORMAT = 2  # of the hash: increase it with every change of what is hashed
SPACING_BYTES = 4 << 20
SHARDS_AT_ONCE = 16  # storage answers many reads at once faster than one after another
COMPANIONS = (
    GENERATION_FILE,
    MODELOPT_FILE,
    AUTOGPTQ_FILE,
    AUTOAWQ_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "tiktoken.model",
    "tekken.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.txt",
)
INCIDENTAL = ("_name_or_path", "transformers_version")  # config keys that differ between copies of one model

# File, size, times of the last changes of content and of the inode in ns, inode. The kernel sets the second time. So a
# change of content changes a stamp, unless the earlier change is too recent to tell the two apart.
_Stamp = tuple[str, int, int, int, int]
RECENT_NS = 2 * 10**9


def revision_of(checkpoint: Checkpoint, verify: Verify = "sampled") -> str:
    """Returns the revision of `checkpoint`, 32 hex digits. It is cached, on disk too, until a file changes.

    `sampled` and `full` give different revisions, so all services of one system must use the same. Raises CheckpointError
    if a file cannot be read.
    """
    companions = [checkpoint.path / name for name in COMPANIONS]
    companions += sorted(checkpoint.path.glob("additional_chat_templates/*.jinja"))
    stamps = tuple(_stamp(file) for file in [*checkpoint.shards, *filter(Path.is_file, companions)])
    config = {key: value for key, value in checkpoint.config.items() if key not in INCIDENTAL}
    recent = any(changed > time.time_ns() - RECENT_NS for _, _, _, changed, _ in stamps)
    compute = _digest if recent else _cached
    return compute(json.dumps(config, sort_keys=True), len(checkpoint.shards), stamps, verify)


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

    `stamps` are those of the `shards` shards, then those of the COMPANIONS and of further chat templates.
    """
    key = hashlib.blake2b(repr((FORMAT, config, shards, stamps, verify)).encode(), digest_size=DIGEST_BYTES).hexdigest()
    file = folder / "revisions" / key if (folder := cache_dir()) else None
    with contextlib.suppress(OSError, ValueError):
        if file and len(revision := read_derived(file)) == 2 * DIGEST_BYTES:
            return revision
    revision = _digest(config, shards, stamps, verify)
    if file:
        with contextlib.suppress(OSError):  # without a writable cache the next reader computes it again
            write_derived(file, revision)
            prune_derived(file.parent.iterdir())
    return revision


def _digest(config: str, shards: int, stamps: tuple[_Stamp, ...], verify: Verify) -> str:
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    _add(digest, verify.encode())
    _add(digest, config.encode())
    vocabularies = frozenset(_vocabularies(json.loads(config)))
    files = [Path(name) for name, *_ in stamps]
    sampled = [position < shards and verify == "sampled" for position in range(len(files))]
    try:
        with ThreadPoolExecutor(SHARDS_AT_ONCE) as threads:
            contents = threads.map(partial(_content, vocabularies), files, sampled)
            for file, (_, size, *_), content in zip(files, stamps, contents, strict=True):
                _add(digest, file.name.encode())
                _add(digest, str(size).encode())
                _add(digest, content)
    except OSError as error:
        place = error.filename or files[0].parent  # an open file that fails has no name
        raise CheckpointError(f"{place}: {unreadable(error)}") from error
    return digest.hexdigest()


def _vocabularies(config: Any) -> Iterator[int]:
    """Yields every `vocab_size` in a config: that of the model, or those of its parts."""
    for key, value in config.items() if isinstance(config, dict) else ():
        if key == "vocab_size" and isinstance(value, int):
            yield value
        yield from _vocabularies(value)


def _content(vocabularies: frozenset[int], file: Path, sampled: bool) -> bytes:
    """Returns a hash of the whole `file`, or of the samples of a shard."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    if not sampled:
        with file.open("rb") as stream:
            while part := stream.read(READ_BYTES):
                digest.update(part)
        return digest.digest()
    entries = sorted(read_header(file).values(), key=lambda entry: entry.start)
    with file.open("rb", buffering=0) as stream:
        if hasattr(os, "posix_fadvise"):  # or each read of a block would read 128 KiB ahead
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        _add(digest, os.pread(stream.fileno(), entries[0].start if entries else file.stat().st_size, 0))
        for entry in entries:
            for start, size in sampled_parts(entry, vocabularies):
                _add(digest, os.pread(stream.fileno(), size, start))
    return digest.digest()


def sampled_parts(entry: TensorEntry, vocabularies: Collection[int]) -> Iterator[tuple[int, int]]:
    """Yields start and size of the parts of a tensor that count: all of it if it has a row per token, else single blocks."""
    if entry.shape and entry.shape[0] in vocabularies:
        for start in range(entry.start, entry.end, READ_BYTES):
            yield start, min(READ_BYTES, entry.end - start)
        return
    last = max(entry.nbytes - BLOCK_BYTES, 0)  # where the last block begins
    intervals = max(2, -(-last // SPACING_BYTES))
    for offset in sorted({last * position // intervals for position in range(intervals + 1)}):
        yield entry.start + offset, min(BLOCK_BYTES, entry.nbytes)


def _add(digest: hashlib.blake2b, part: bytes) -> None:
    """Hashes the length of `part`, then `part`, so that the same bytes divided into other parts give another digest."""
    digest.update(len(part).to_bytes(8, "little"))
    digest.update(part)


def _stamp(file: Path) -> _Stamp:
    try:
        status = file.stat()
    except OSError as error:
        raise CheckpointError(f"{file}: {unreadable(error)}") from error
    return str(file), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
