"""What a revision costs: `python tests/bench/revision_cost.py [SHARDS]` times it on a checkpoint of 4.3 GB a shard.

The shards are sparse files, which hold no data: the time is that of the processor and of the file system's calls. On storage,
add the number of reads divided by the reads per second that it answers at a depth of 16. 163 shards are the 700 GB of
DeepSeek-V3.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.checkpoint.revision import revision_of, sampled_parts

VOCABULARY = 129280
TENSORS, MATRIX = 290, (7168, 2048)  # of a shard; each with the scales of its blocks of 128 x 128
EMBEDDINGS = 4  # those of the model and of its layer for two tokens at once, each with its head


def write_shard(file: Path, number: int) -> list[str]:
    """Writes the header of a shard with fp8 matrices and scales; the rest is a hole. Returns the tensors' names."""
    header, end = {}, 0
    for tensor in range(TENSORS):
        for suffix, dtype, shape, size in (
            ("weight", "F8_E4M3", MATRIX, MATRIX[0] * MATRIX[1]),
            ("weight_scale_inv", "F32", (56, 16), 56 * 16 * 4),
        ):
            name = f"layers.{number}.experts.{tensor}.{suffix}"
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
            end += size
    if number < EMBEDDINGS:
        size = 2 * VOCABULARY * MATRIX[0]
        header[f"embedding.{number}"] = {
            "dtype": "BF16",
            "shape": [VOCABULARY, MATRIX[0]],
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        os.truncate(stream.fileno(), 8 + len(text) + end)
    return list(header)


def main() -> None:
    """Prints size, reads and seconds."""
    shards = int(sys.argv[1]) if len(sys.argv) > 1 else 163
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["MOIETY_CACHE"] = str(folder / "cache")
        (folder / "config.json").write_text(json.dumps({"model_type": "deepseek_v3", "vocab_size": VOCABULARY}))
        index: dict[str, str] = {}
        for number in range(shards):
            file = folder / f"model-{number + 1:05}-of-{shards:05}.safetensors"
            index |= dict.fromkeys(write_shard(file, number), file.name)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        checkpoint = Checkpoint.open(folder)
        parts = [part for entry in checkpoint.tensors.values() for part in sampled_parts(entry, {VOCABULARY})]
        began = time.perf_counter()
        revision_of(checkpoint)
        seconds = time.perf_counter() - began
        gigabytes = sum(shard.stat().st_size for shard in checkpoint.shards) / 1e9
        read = sum(size for _, size in parts) / 1e9
        print(f"{gigabytes:.0f} GB in {shards} shards, {len(checkpoint.tensors)} tensors")
        print(f"{len(parts)} reads of {read:.1f} GB, {seconds:.1f} s without storage")


if __name__ == "__main__":
    main()
